"""Networks that are written as people write them, and not as a tracer would like them; each is odd in one way.

`make(name=...)` is a factory for `--model tests.support.odd_networks:make --model-arg name=NAME`. `NETWORKS` says of
each what a sample is, whether zeroing what a submodel lacks gives the submodel's outputs (a normalisation over pruned
channels does not), and of those that may be refused, why.
"""

import contextlib
import copy
import functools
import itertools
import threading
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint

VECTOR, SEQUENCE, IMAGE, TOKENS = (8,), (5, 8), (2, 8, 8), (6,)
CLASSES, VOCABULARY, END = 4, 20, 0


@dataclass(frozen=True)
class Odd:
    """An odd network's class, the shape of a sample, and what may be expected of it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    exact: bool
    refused: str

    @property
    def tokens(self) -> bool:
        return self.shape == TOKENS

    def samples(self, count: int, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            tokens = torch.randint(0, VOCABULARY, (count, *self.shape), generator=generator)
            tokens[:, -1] = END
            return tokens
        return torch.randn(count, *self.shape, generator=generator)


NETWORKS: dict[str, Odd] = {}


def odd(shape: tuple[int, ...], exact: bool = True, refused: str = "") -> Callable[[Callable[[], nn.Module]], Any]:
    """Registers a class or a function under its name in snake case."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in build.__name__).lstrip("_")
        NETWORKS[name] = Odd(build, shape, exact, refused)
        return build

    return register


def make(name: str) -> nn.Module:
    """The network of that name, with random weights and running statistics that are not those of a new network."""
    model = NETWORKS[name].build()
    for module in model.modules():
        has_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        if has_statistics and not isinstance(module, nn.modules.lazy.LazyModuleMixin):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


class Head(nn.Module):
    """Logits of a map's or a sequence's means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)) if x.dim() == 4 else x.mean(1))


# --- what modules share and hold ------------------------------------------------------------------------------------


class Writer(nn.Module):
    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.layer, self.shared = nn.Linear(8, 12), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.layer(x))
        if isinstance(self.shared, dict):
            self.shared["kept"] = x
        elif isinstance(self.shared, list):
            self.shared[:] = [x]
        return x


class Reader(nn.Module):
    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.layer, self.shared = nn.Linear(12, 12), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.shared["kept"] if isinstance(self.shared, dict) else self.shared[0]
        return torch.relu(self.layer(x)) + kept


@odd(VECTOR)
class SharedDict(nn.Module):
    """One module writes what another reads."""

    def __init__(self) -> None:
        super().__init__()
        shared: dict[str, torch.Tensor] = {}
        self.first, self.second, self.head = Writer(shared), Reader(shared), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)))


@odd(VECTOR)
class SharedList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared: list[torch.Tensor] = []
        self.first, self.second, self.head = Writer(shared), Reader(shared), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)))


class Switch(nn.Module):
    def __init__(self, on: set[str]) -> None:
        super().__init__()
        self.layer, self.on = nn.Linear(12, 12), on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.layer(x)) if "second" in self.on else x


@odd(VECTOR)
class SharedSet(nn.Module):
    """A set that one module fills while it runs, and that another looks into."""

    def __init__(self) -> None:
        super().__init__()
        self.on: set[str] = set()
        self.enter, self.switch, self.head = nn.Linear(8, 12), Switch(self.on), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.on.add("second")
        return self.head(self.switch(torch.relu(self.enter(x))))


@odd(VECTOR)
class KeepsItsParent(nn.Module):
    """A part that reaches the whole by a list, so that it is no submodule of its own."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.parents = nn.Linear(12, 12), []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.layer(x)) * self.parents[0].scale

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.part, self.head = nn.Linear(8, 12), KeepsItsParent.Part(), nn.Linear(12, CLASSES)
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.part.parents.append(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.part(torch.relu(self.enter(x))))


@odd(VECTOR)
class WeakReference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.other = weakref.ref(self.enter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.other()(x)))


@odd(VECTOR)
class HoldsALock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head, self.lock = nn.Linear(8, 12), nn.Linear(12, CLASSES), threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.head(torch.relu(self.enter(x)))


@odd(VECTOR, refused="a generator has no copy")
class HoldsGenerators(nn.Module):
    """A Python generator, a counter and torch's generator of random numbers, which training draws from."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.steps, self.names = itertools.count(), (name for name in ("a", "b"))
        self.random = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        next(self.steps)
        x = torch.relu(self.enter(x))
        if self.training:
            x = x + 0.01 * torch.randn(x.shape[1], generator=self.random)
        return self.head(x)


@odd(VECTOR)
class HoldsLambdas(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.activation = lambda x: torch.where(x > 0, x, 0.1 * x)
        self.finish = functools.partial(torch.mul, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.finish(self.activation(self.enter(x))))


@odd(VECTOR)
def hook_on_a_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    model[0].register_forward_hook(lambda module, inputs, output: 0.5 * output + 0.1 * output.square())
    return model


@odd(VECTOR, refused="a hook that closes over the network that was, and not over its copy")
class HookClosesOverSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.scale, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.seen: torch.Tensor | None = None
        self.enter.register_forward_hook(self.scaled)

    def scaled(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output * torch.sigmoid(self.scale(inputs[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.enter(x)))


@odd(VECTOR, refused="a constant as wide as the layer, which cannot be cut")
class PlainTensors(nn.Module):
    """A constant that is neither parameter nor buffer, and one that remembers what it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.constant, self.norm = torch.linspace(0.5, 1, 12), (0 * self.enter.weight + 1).norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.enter(x)) * self.constant / self.norm.detach())


@odd(VECTOR)
class ExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head, self.seen = nn.Linear(8, 12), nn.Linear(12, CLASSES), {"epoch": 3}

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.enter(x)))


# --- which parts run ------------------------------------------------------------------------------------------------


@odd(VECTOR)
class Experts(nn.Module):
    """Each sample to the one expert that a router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router = nn.Linear(8, 12), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(3))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).argmax(1)
        h = torch.relu(self.enter(x))
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any():
                out[mine] = expert(h[mine])
        return self.head(out)


@odd(VECTOR)
class SoftExperts(nn.Module):
    """All experts, mixed by a router's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(3))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(1)
        mixed = torch.stack([expert(x) for expert in self.experts], 1)
        return self.head(torch.relu((shares[:, :, None] * mixed).sum(1)))


@odd(VECTOR)
class UnusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.spare, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.enter(x)))


@odd(VECTOR)
class OneSampleAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [torch.relu(self.body(torch.relu(self.enter(row[None])))) for row in x]
        return self.head(torch.cat(rows))


@odd(VECTOR)
class TurnsByBatch(nn.Module):
    """As many turns as there are pairs of samples, each with code that fixes a width."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.relu(self.enter(part)).split([6, 6], 1) for part in x.split(2)]
        return self.head(torch.cat([a * b for a, b in parts]))


@odd(VECTOR)
class SkipsInTraining(nn.Module):
    """Stochastic depth: in training, layers are left out by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.5:
                x = x + torch.relu(layer(x))
        return self.head(x)


@odd(VECTOR)
class ReadsValues(nn.Module):
    """A branch by what the samples are."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.warm, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.enter(x))
        return self.head(h + torch.relu(self.warm(h)) if float(x.abs().max()) > -1 else h)


@odd(VECTOR)
class Scan(nn.Module):
    """A state that starts at zeros made on the CPU, with sizes in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.step, self.head = nn.Linear(1, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], 12)
        for turn in range(3):
            state = torch.tanh(self.step(state) + self.enter(x[:, turn : turn + 1]))
        return self.head(state)


@odd(VECTOR)
class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        x = checkpoint(self.body, x, use_reentrant=False) if self.training else self.body(x)
        return self.head(torch.relu(x))


# --- gradients ------------------------------------------------------------------------------------------------------


@odd(IMAGE)
class WithoutGradient(nn.Module):
    """A stem under no_grad, as frozen backbones are run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 10, 1), Head(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.body(x)))


@odd(VECTOR)
class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.enter(x)) * torch.sigmoid(self.gate(x)).detach())


@odd(VECTOR)
class NoDerivative(nn.Module):
    """Signs and rounding: there is a gradient, and it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(torch.sign(self.enter(x)).round())))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@odd(VECTOR)
class OwnAutograd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(StraightThrough.apply(self.enter(x)))))


@odd(VECTOR)
class InferenceInside(nn.Module):
    """Statistics under inference mode, which autograd refuses to save."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            largest = x.abs().amax(1, keepdim=True).clamp_min(1e-3)
        return self.head(torch.relu(self.enter(x / largest.clone())))


# --- weights and buffers --------------------------------------------------------------------------------------------


@odd(SEQUENCE)
class InfinityInAMask(nn.Module):
    """Causal attention by a buffer of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), Head(12)
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4 + self.mask
        return self.head(torch.relu(scores.softmax(-1) @ self.v(x)))


@odd(VECTOR, refused="complex numbers that a device trained are not merged")
class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.enter, self.head = nn.Linear(8, 9), nn.Linear(9, 12), nn.Linear(12, CLASSES)
        self.spectrum = nn.Parameter(torch.randn(7, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.enter(torch.relu(self.first(x))))
        return self.head(torch.fft.irfft(torch.fft.rfft(h) * self.spectrum, n=12))


@odd(VECTOR)
def lazy_layers() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(12), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(CLASSES))


@odd(VECTOR)
class TiedTransposed(nn.Module):
    """A decoder that is the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.code, self.head = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = torch.tanh(self.code(torch.relu(self.enter(x))))
        return self.head(torch.relu(F.linear(code, self.code.weight.t())))


@odd(VECTOR)
class TiedLayers(nn.Module):
    """One weight of two layers, and one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight, self.head = self.first.weight, nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.first(x)))


@odd(TOKENS)
class TiedEmbedding(nn.Module):
    """Scores of all tokens by the embedding itself, then classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(VOCABULARY, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.body(self.embed(x).mean(1)))
        return self.head(torch.tanh(F.linear(h, self.embed.weight)))


@odd(VECTOR, exact=False)
def weight_norm_by_hook() -> nn.Module:
    layers = nn.utils.weight_norm(nn.Linear(8, 12)), nn.ReLU(), nn.utils.weight_norm(nn.Linear(12, 10)), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, CLASSES))


@odd(VECTOR, exact=False)
def weight_norm_parametrized() -> nn.Module:
    first, second = (parametrizations.weight_norm(nn.Linear(*size)) for size in ((8, 12), (12, 10)))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, CLASSES))


@odd(VECTOR, exact=False)
def spectral_norm() -> nn.Module:
    normed = parametrizations.spectral_norm(nn.Linear(9, 12))
    return nn.Sequential(
        nn.Linear(8, 9), nn.ReLU(), normed, nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, CLASSES)
    )


class Positive(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softplus(x)


@odd(VECTOR, exact=False)
def positive_weights() -> nn.Module:
    """A parametrization under which a stored zero is no zero."""
    first, second = nn.Linear(8, 12), nn.Linear(12, CLASSES)
    parametrize.register_parametrization(first, "weight", Positive())
    return nn.Sequential(first, nn.Tanh(), second)


@odd(VECTOR)
def masks_of_torch_prune() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    torch_prune.l1_unstructured(model[0], "weight", 0.3)
    return model


@odd(IMAGE)
class WeightOfAnotherShape(nn.Module):
    """A kernel kept as a matrix, and a linear layer run as a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel = nn.Conv2d(2, 8, 3, padding=1), nn.Parameter(torch.randn(10, 72) * 0.1)
        self.score, self.head = nn.Linear(10, 12), Head(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(F.conv2d(torch.relu(self.first(x)), self.kernel.view(10, -1, 3, 3), padding=1))
        return self.head(torch.relu(F.conv2d(x, self.score.weight[:, :, None, None], self.score.bias)))


@odd(SEQUENCE)
class ConstantsThroughLayers(nn.Module):
    """Positions that a small network makes from constants, and a weight with a low-rank product added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 10), Head(10)
        self.position = nn.Sequential(nn.Linear(1, 9), nn.ReLU(), nn.Linear(9, 12))
        self.register_buffer("places", torch.linspace(-1, 1, 5)[:, None])
        self.thin_in, self.thin_out = nn.Parameter(torch.randn(2, 12) * 0.1), nn.Parameter(torch.randn(10, 2) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.embed(x)) + self.position(self.places)
        return self.head(torch.relu(F.linear(x, self.hidden.weight + self.thin_out @ self.thin_in, self.hidden.bias)))


@odd(VECTOR)
class ParameterContainers(nn.Module):
    """Weights in a list and a dictionary, a scalar, an empty one, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(12, 8) * 0.3, torch.randn(10, 12) * 0.3])
        self.more = nn.ParameterDict({"head": torch.randn(CLASSES, 10) * 0.3, "scale": torch.tensor(1.5)})
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("offset", torch.linspace(0, 1, 12), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(F.linear(x, self.weights[0]) + self.offset) * self.more["scale"]
        return F.linear(torch.relu(F.linear(x, self.weights[1])), self.more["head"])


@odd(VECTOR)
class IntegerWeights(nn.Module):
    """A weight of 8-bit numbers with a scale for each output, as weight-only quantisation has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.enter, self.head = nn.Linear(8, 9), nn.Linear(9, 12), nn.Linear(10, CLASSES)
        self.register_buffer("numbers", torch.randint(-90, 90, (10, 12), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(10, 1) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(
            torch.relu(F.linear(torch.relu(self.enter(torch.relu(self.first(x)))), self.numbers.float() * self.scale))
        )


@odd(VECTOR)
def batch_norms_without() -> nn.Module:
    """Normalisations without weights, and one after another."""
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12, affine=False), nn.ReLU(), nn.Linear(12, 10), nn.BatchNorm1d(10),
        nn.PReLU(10), nn.Linear(10, CLASSES),
    )  # fmt: skip


# --- dtypes ---------------------------------------------------------------------------------------------------------


@odd(VECTOR)
class HalfInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.narrow, self.head = nn.Linear(8, 12), nn.Linear(12, 10).bfloat16(), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.narrow(torch.relu(self.enter(x)).bfloat16())).float())


@odd(VECTOR)
class DoubleInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.wide, self.head = nn.Linear(8, 12), nn.Linear(12, 10).double(), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.wide(torch.relu(self.enter(x)).double())).float())


@odd(VECTOR)
class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.relu(self.body(torch.relu(self.enter(x))))
        return self.head(x.float())


# --- what forward does to its input and its state -------------------------------------------------------------------


@odd(VECTOR, refused="changes its own input")
class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        return self.head(torch.relu(self.enter(x)))


@odd(VECTOR)
class CountsItsCalls(nn.Module):
    """A counter of integers in the state, that each training step raises."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head, self.calls = nn.Linear(8, 12), nn.Linear(12, CLASSES), 0
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.training:
            self.steps += 1
        return self.head(torch.relu(self.enter(x)))


@odd(VECTOR, exact=False, refused="its outputs depend on the calls before")
class RemembersSamples(nn.Module):
    """A running mean that evaluation moves too."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.head(x - self.mean)


@odd(VECTOR, refused="samples influence one another")
class ComparesSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        return self.head(x - x.mean(0))


@odd(VECTOR, exact=False, refused="its outputs are random")
class NoiseWhenEvaluated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.dropout(torch.relu(self.enter(x)), 0.2, training=True))


@odd(VECTOR)
class NoiseInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        return self.head(x + 0.1 * torch.randn_like(x) if self.training else x)


# --- outputs --------------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """Two heads on one body."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head, self.other = nn.Linear(8, 12), nn.Linear(12, CLASSES), nn.Linear(12, 3)

    def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.enter(x))
        return self.head(x), self.other(x)


@odd(VECTOR)
class TupleOutput(Outputs):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.both(x)


@odd(VECTOR)
class DictOutput(Outputs):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(("logits", "boxes"), self.both(x), strict=True))


Named = namedtuple("Named", ["logits", "boxes"])


@odd(VECTOR)
class NamedTupleOutput(Outputs):
    def forward(self, x: torch.Tensor) -> Named:
        return Named(*self.both(x))


class Answer:
    """An output that is an object of one's own: what it holds are the network's outputs, and keep their widths."""

    def __init__(self, logits: torch.Tensor, others: torch.Tensor) -> None:
        self.logits, self.others = logits, others


@odd(VECTOR)
class ObjectOutput(Outputs):
    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(*self.both(x))


@odd(VECTOR)
class OutputsByMode(Outputs):
    """Both heads in training, one when evaluated."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.both(x) if self.training else self.both(x)[0]


@odd(IMAGE, refused="a class for each place")
class SpatialOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


@odd(VECTOR, refused="one number a sample")
class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.enter(x)))[:, 0]


# --- operators ------------------------------------------------------------------------------------------------------


@odd(SEQUENCE)
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = (
            nn.Parameter(torch.randn(8, 3, 4) * 0.3),
            nn.Parameter(torch.randn(3, 4, 12) * 0.3),
            Head(12),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.relu(torch.einsum("bti,ihd->bthd", x, self.a))
        return self.head(torch.relu(torch.einsum("bthd,hdo->bto", heads, self.b)))


@odd(SEQUENCE)
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.lstm, self.head = nn.Linear(8, 10), nn.LSTM(10, 9, 2, batch_first=True), Head(9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(torch.relu(self.enter(x)))[0])


@odd(SEQUENCE)
class BothDirections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gru = nn.Linear(8, 9), nn.GRU(9, 7, batch_first=True, bidirectional=True)
        self.head = Head(14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(torch.relu(self.enter(x)))[0])


@odd(IMAGE)
class Unfolded(nn.Module):
    """A convolution as people write it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.matrix, self.head = nn.Conv2d(2, 6, 1), nn.Linear(54, 10), Head(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.matrix(F.unfold(torch.relu(self.enter(x)), 3, padding=1).transpose(1, 2))))


@odd(IMAGE)
class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(4, 8, 3), Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pixel_shuffle(torch.relu(self.first(x)), 2)
        return self.head(
            torch.relu(self.second(F.pixel_unshuffle(F.pixel_shuffle(torch.cat([x] * 4, 1), 2), 2)[:, :4]))
        )


@odd(IMAGE)
def grouped_convolutions() -> nn.Module:
    """Grouped, depthwise with a multiplier, transposed and dilated."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=12), nn.BatchNorm2d(24), nn.ReLU(),
        nn.ConvTranspose2d(24, 10, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(10, 6, 3, groups=2), nn.ReLU(), Head(6),
    )  # fmt: skip


@odd(IMAGE)
class Interpolated(nn.Module):
    """A feature pyramid: bilinear, nearest, by a size and by a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.side, self.head = nn.Conv2d(8, 8, 1), Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        deep = F.interpolate(torch.relu(self.deep(x)), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(F.interpolate(self.side(x) + deep, scale_factor=0.5, mode="nearest"))


@odd(SEQUENCE)
class Fourier(nn.Module):
    """Mixing along the sequence in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.head = nn.Linear(8, 12), nn.Linear(12, 10), Head(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(x))
        return self.head(torch.relu(self.leave(torch.fft.fft(x, dim=1).real)))


@odd(VECTOR, exact=False)
class LargestEntries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.enter, self.head = nn.Linear(8, 9), nn.Linear(9, 12), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.enter(torch.relu(self.first(x))).topk(5, 1).values)


@odd(VECTOR)
class Gathered(nn.Module):
    """Features in an order that a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.enter, self.head = nn.Linear(8, 9), nn.Linear(9, 12), nn.Linear(12, CLASSES)
        self.register_buffer("order", torch.randperm(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(torch.relu(self.first(x))))
        return self.head(x[:, self.order] + x.gather(1, self.order.expand(len(x), -1)))


@odd(TOKENS)
class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.body, self.head = nn.EmbeddingBag(VOCABULARY, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.bag(x))))


@odd(TOKENS)
class Embedded(nn.Module):
    """Embedded tokens, whose positions come from the shape, and a padding that is masked by value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, 12, padding_idx=0), nn.Embedding(6, 12)
        self.body, self.head = nn.Linear(12, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.body(self.embed(x) + self.place(torch.arange(x.shape[1]))))
        there = (x != 0).to(h.dtype)[:, :, None]
        return self.head((h * there).sum(1) / there.sum(1).clamp_min(1))


@odd(VECTOR, refused="a scripted part cannot be cut")
def scripted_part() -> nn.Module:
    part = torch.jit.script(nn.Sequential(nn.Linear(12, 12), nn.ReLU()))
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), part, nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, CLASSES))


@odd(SEQUENCE, exact=False)
def transformer_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), Head(8))


@odd(IMAGE, exact=False)
def normalisations() -> nn.Module:
    """Over groups, over all, over each map, and of the vector."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.InstanceNorm2d(10, affine=True),
        nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(40), nn.Linear(40, 12), nn.Softmax(1),
        nn.Linear(12, CLASSES),
    )  # fmt: skip


@odd(VECTOR, exact=False)
class CosineClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.enter = nn.Linear(8, 9), nn.Linear(9, 12)
        self.classes = nn.Parameter(torch.randn(CLASSES, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * F.normalize(torch.relu(self.enter(torch.relu(self.first(x))))) @ F.normalize(self.classes).t()


@odd(IMAGE)
class ShuffledChannels(nn.Module):
    """Channels shuffled by literal sizes, halves that are gated, rolled and summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x.view(x.shape[0], 2, 6, 8, 8).transpose(1, 2).reshape(x.shape[0], 12, 8, 8)
        a, b = x.chunk(2, 1)
        return self.head(torch.relu(self.second(a * torch.sigmoid(b))).roll(1, 3).cumsum(2))


@odd(SEQUENCE, exact=False)
class OtherConvolutions(nn.Module):
    """Convolutions of sequences and volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.volume, self.head = nn.Conv1d(5, 9, 3, padding=1), nn.Conv3d(1, 6, 3, padding=1), Head(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.line(x))
        return self.head(torch.relu(self.volume(x[:, None, :, :, None]))[..., 0])


@odd(VECTOR, refused="no gate can be measured inside torch.vmap")
class VectorisedMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: self.head(torch.relu(self.enter(row))))(x)


@odd(VECTOR)
class OwnLinear(nn.Module):
    """A subclass of a layer that does more than the layer, and a context around it."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + F.linear(x, self.weight.abs())

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = OwnLinear.Doubled(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(ValueError):
            return self.head(torch.relu(self.enter(x)))


@odd(VECTOR)
class CopiesItself(nn.Module):
    """Momentum's copy of a layer, whose weights are parameters without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.slow = copy.deepcopy(self.enter).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.enter(x)) + torch.relu(self.slow(x)))


# --- as libraries write them ------------------------------------------------------------------------------------------


@odd(VECTOR)
class ReadsItsVersion(nn.Module):
    """As torchvision's MNASNet: a state without the version that its own has is refused."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.head = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"of version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.enter(x))))


@odd(TOKENS, refused="without samples: it takes none that have no end")
class ReadsTheEnd(nn.Module):
    """What it knows of a sentence it takes from where that ends, which all must; heads as T5 splits them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.q, self.v = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 24), nn.Linear(16, 24)
        self.join, self.head = nn.Linear(24, 16), nn.Linear(16, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        ends = tokens.eq(END)
        if not bool(ends.any(1).all()):
            raise ValueError("a sentence without end")
        h = self.enter(tokens)
        q, v = (part(h).view(len(h), -1, 4, 6).transpose(1, 2) for part in (self.q, self.v))
        mixed = F.scaled_dot_product_attention(q, q, v).transpose(1, 2).reshape(len(h), -1, 24)
        h = h + self.join(mixed)
        return self.head(torch.stack([row[end][-1] for row, end in zip(h, ends, strict=True)]))


@odd(SEQUENCE)
class KeepsPositions(nn.Module):
    """As timm's ConViT: distances for the length that it last saw, made when that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.value, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)
        self.place = nn.Linear(2, 1)
        self.register_buffer("distances", torch.zeros(1, 1, 2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        if self.distances.shape[1] != length:
            made = torch.zeros(length, length, 2)
            made[:, :, 0] = torch.arange(length).float() - torch.arange(length).float()[:, None]
            made[:, :, 1] = made[:, :, 0] ** 2
            self.distances = made.to(self.place.weight.dtype)
        h = torch.relu(self.enter(x))
        return self.head((self.place(self.distances)[..., 0].softmax(-1) @ self.value(h)).mean(1))


@odd(SEQUENCE)
class LoopOverHeads(nn.Module):
    """As timm's EfficientViT: each head has layers of its own, and one line splits what they give into fixed widths."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 24), nn.Linear(24, CLASSES)
        self.parts = nn.ModuleList(nn.Linear(8, 4 + 4 + 8) for _ in range(3))
        self.join = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = []
        for part, h in zip(self.parts, torch.relu(self.enter(x)).chunk(3, dim=-1), strict=True):
            q, k, v = part(h).split([4, 4, 8], dim=-1)
            mixed.append((q @ k.transpose(-2, -1)).softmax(-1) @ v)
        return self.head(torch.relu(self.join(torch.cat(mixed, -1))).mean(1))
