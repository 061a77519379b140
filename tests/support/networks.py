"""Random small networks for property tests, masks over their channel groups, and what masking them must give.

Everything a network is made of follows from drawn integers, so that a counterexample can be built again.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import nn

from cahfp_cli.coupling.analysis import Analysis, analyse
from cahfp_cli.coupling.groups import KEPT, ChannelGroups

torch.set_num_threads(1)  # networks this small only wait for other threads

SIDE, CLASSES = 6, 3
IMAGE = (2, SIDE, SIDE)


def examples(count: int) -> settings:
    """So many, of networks: shrinking one would take minutes."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        phases=[Phase.explicit, Phase.generate],
        max_examples=count,
        suppress_health_check=slow,
    )


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode with random weights, and the shape of one sample."""

    model: nn.Module
    input_shape: tuple[int, ...]

    def analyse(self) -> Analysis:
        return analyse(self.model, self.input_shape, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def samples(self, batch: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((batch, *self.input_shape), generator=generator, dtype=torch.float64).to(self.dtype)


# --- blocks of images (b, channels, side, side) ---------------------------------------------------------------------


class Residual(nn.Module):
    """x + body(x), with a projection where the widths differ."""

    def __init__(self, body: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.projection = body, projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + (x if self.projection is None else self.projection(x)))


class Concatenate(nn.Module):
    """x and body(x) side by side."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.body(x)], 1)


class SqueezeExcite(nn.Module):
    """x scaled channel by channel by what its own means say."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Glu(nn.Module):
    """Half of body(x) times the sigmoid of the other half, along one axis."""

    def __init__(self, body: nn.Module, axis: int, functional: bool) -> None:
        super().__init__()
        self.body, self.axis, self.functional = body, axis, functional

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.functional:
            return nn.functional.glu(self.body(x), self.axis)
        value, gate = self.body(x).chunk(2, self.axis)
        return value * torch.sigmoid(gate)


class Twice(nn.Module):
    """The same layer applied two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


class PooledBranches(nn.Module):
    """Two branches over different poolings of x, added."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
        return self.first(nn.functional.max_pool2d(x, 3, stride=1, padding=1)) + self.second(pool)


class Halves(nn.Module):
    """The two halves of x, one of them through a layer, side by side and shuffled, as in ShuffleNet."""

    def __init__(self, body: nn.Module, shuffle: bool) -> None:
        super().__init__()
        self.body, self.shuffle = body, shuffle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 1)
        joined = torch.cat([left, self.body(right)], 1)
        if not self.shuffle:
            return joined
        b, channels, height, side = joined.shape
        return joined.view(b, 2, channels // 2, height, side).transpose(1, 2).reshape(b, channels, height, side)


Draw = Callable[[st.SearchStrategy[Any]], Any]


def activation(draw: Draw) -> nn.Module:
    return draw(st.sampled_from([nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Identity]))()


def norm(draw: Draw, channels: int) -> nn.Module:
    kinds = ["batch", "batch", "none"]
    if channels % 2 == 0:
        kinds.append("group")
    kind = draw(st.sampled_from(kinds))
    if kind == "group":
        return nn.GroupNorm(draw(st.sampled_from([g for g in (2, 3, 4) if channels % g == 0])), channels)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


def width(draw: Draw) -> int:
    return draw(st.integers(2, 6))


def conv(draw: Draw, channels: int, out: int | None = None, groups: int = 1) -> tuple[nn.Module, int]:
    out = width(draw) if out is None else out
    size = draw(st.sampled_from([1, 3]))
    layer = nn.Conv2d(channels, out, size, padding=size // 2, groups=groups, bias=draw(st.booleans()))
    return nn.Sequential(layer, norm(draw, out), activation(draw)), out


def residual(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    """One block with a projection, or several that share one stream."""
    if draw(st.booleans()):
        inner, hidden = conv(draw, channels)
        outer, out = conv(draw, hidden)
        projection = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), norm(draw, out))
        return Residual(nn.Sequential(inner, outer), projection), out
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        inner, hidden = conv(draw, channels)
        blocks.append(Residual(nn.Sequential(inner, conv(draw, hidden, channels)[0])))
    return nn.Sequential(*blocks), channels


def dense(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    blocks = []
    for _ in range(draw(st.integers(1, 2))):
        body, out = conv(draw, channels)
        blocks.append(Concatenate(body))
        channels += out
    return nn.Sequential(*blocks), channels


def grouped(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    """Many small groups, or few large ones."""
    groups, ins, outs = draw(st.sampled_from([(4, 2, 1), (3, 2, 2), (2, 3, 2), (2, 4, 3), (3, 3, 2), (4, 1, 2)]))
    before, _ = conv(draw, channels, groups * ins)
    after, out = conv(draw, groups * ins, groups * outs, groups)
    return nn.Sequential(before, after), out


def separable(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    multiplier = draw(st.sampled_from([1, 1, 2]))
    depthwise, between = conv(draw, channels, channels * multiplier, channels)
    pointwise, out = conv(draw, between)
    return nn.Sequential(depthwise, pointwise), out


def squeeze_excite(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    return SqueezeExcite(channels, width(draw)), channels


def glu(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    out = width(draw)
    layer = nn.Conv2d(channels, 2 * out, 1)
    return Glu(layer, 1, draw(st.booleans())), out


def twice(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    """One layer used twice, or two layers with one weight."""
    if draw(st.booleans()):
        return Twice(nn.Conv2d(channels, channels, 3, padding=1)), channels
    first, second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
    second.weight = first.weight
    return nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), second), channels


def branches(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    first, out = conv(draw, channels)
    return PooledBranches(first, conv(draw, channels, out)[0]), out


def halves(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    half = width(draw)
    before, _ = conv(draw, channels, 2 * half)
    return nn.Sequential(before, Halves(conv(draw, half, half)[0], draw(st.booleans()))), 2 * half


BLOCKS = (conv, residual, dense, grouped, separable, squeeze_excite, glu, twice, branches, halves)


def head(draw: Draw, channels: int) -> nn.Module:
    """Pooling or flattening, then one linear layer or several."""
    if draw(st.booleans()):
        start, features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels
    else:
        start, features = nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), channels * (SIDE // 2) ** 2
    return (
        nn.Sequential(start, *mlp(draw, features), nn.Linear(features, CLASSES))
        if draw(st.booleans())
        else (nn.Sequential(start, nn.Linear(features, CLASSES)))
    )


def mlp(draw: Draw, features: int) -> list[nn.Module]:
    """Linear layers with norms, residual blocks, gates and tied weights; as many features come out as go in."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        hidden = width(draw)
        kind = draw(st.sampled_from(["plain", "norm", "batch", "residual", "glu", "tied"]))
        inner, outer = nn.Linear(features, hidden), nn.Linear(hidden, features, bias=draw(st.booleans()))
        if kind == "residual":
            layers.append(Residual(nn.Sequential(inner, activation(draw), outer)))
        elif kind == "glu":
            layers += [Glu(nn.Linear(features, 2 * hidden), -1, draw(st.booleans())), outer]
        elif kind == "tied":
            square = nn.Linear(features, features)
            other = nn.Linear(features, features)
            other.weight = square.weight
            layers += [square, nn.ReLU(), other]
        else:
            between = {"plain": nn.Identity, "norm": nn.LayerNorm, "batch": nn.BatchNorm1d}[kind]
            layers += [inner, between() if kind == "plain" else between(hidden), activation(draw), outer]
    return layers


# --- a vision transformer -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention whose number of heads follows the width, with q, k and v apart or packed."""

    def __init__(self, features: int, heads: int, head_width: int, packed: bool, fused: bool) -> None:
        super().__init__()
        self.head_width, self.packed, self.fused = head_width, packed, fused
        inner = heads * head_width
        if packed:
            self.qkv = nn.Linear(features, 3 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(features, inner) for _ in range(3))
        self.out = nn.Linear(inner, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        if self.packed:
            parts = self.qkv(x).reshape(b, n, 3, -1, self.head_width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = [layer(x).reshape(b, n, -1, self.head_width).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        q, k, v = parts
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * self.head_width**-0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, n, -1))


class Layer(nn.Module):
    """Attention and an MLP, each added to the stream after a norm."""

    def __init__(self, features: int, attention: nn.Module, hidden: int, normed: bool) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = (nn.LayerNorm(features) if normed else nn.Identity() for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, layers, a head on the class token."""

    def __init__(self, features: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(IMAGE[0], features, 3, stride=3)
        self.token = nn.Parameter(torch.randn(1, 1, features))
        self.position = nn.Parameter(torch.randn(1, 1 + (SIDE // 3) ** 2, features))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.layers(x)[:, 0])


# --- strategies -----------------------------------------------------------------------------------------------------


@st.composite
def convolutional(draw: Any) -> Network:
    """One to four blocks of any kind and a head."""
    model, channels = conv(draw, IMAGE[0])
    blocks = [model]
    for _ in range(draw(st.integers(1, 3))):
        block, channels = draw(st.sampled_from(BLOCKS))(draw, channels)
        blocks.append(block)
    return Network(nn.Sequential(*blocks, head(draw, channels)), IMAGE)


@st.composite
def perceptrons(draw: Any) -> Network:
    """Linear layers on a vector."""
    features = width(draw)
    first = nn.Linear(5, features)
    return Network(nn.Sequential(first, *mlp(draw, features), nn.Linear(features, CLASSES)), (5,))


@st.composite
def transformers(draw: Any) -> Network:
    """A small vision transformer, with and without layer norms."""
    features = 2 * draw(st.integers(2, 4))
    normed, packed, fused = (draw(st.booleans()) for _ in range(3))
    layers = [
        Layer(features, Attention(features, draw(st.integers(2, 3)), 3, packed, fused), width(draw), normed)
        for _ in range(draw(st.integers(1, 2)))
    ]
    return Network(VisionTransformer(features, layers), IMAGE)


@st.composite
def networks(draw: Any, dtype: torch.dtype | None = torch.float32) -> Network:
    """Any of them, with random weights; `dtype` None draws float32 or float64."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    network = draw(st.one_of(convolutional(), convolutional(), perceptrons(), transformers()))
    randomise(network.model)
    chosen = draw(st.sampled_from([torch.float32, torch.float64])) if dtype is None else dtype
    return Network(network.model.to(chosen).eval(), network.input_shape)


def randomise(model: nn.Module) -> None:
    """Norms as training leaves them: no scale is 1, no shift is 0, statistics are those of some data."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(17)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)


@dataclass(frozen=True)
class Masks:
    """How to mask any network: the kind, and the seed of what is random about it."""

    kind: str
    seed: int
    rates: tuple[float, ...] = field(default=(0.2, 0.5, 0.8))

    def of(self, groups: ChannelGroups, equivalent: bool = False) -> np.ndarray:
        """Boolean (groups,), at least the narrowest width of every family; `equivalent` spares those where zeroing
        differs."""
        rng = np.random.default_rng(self.seed)
        kept = np.ones(groups.count, dtype=bool)
        for number in range(len(groups.names)):
            members = rng.permutation(np.flatnonzero(groups.family == number))
            least = groups.narrowest[number]
            if equivalent and number in groups.not_mask_equivalent:
                continue
            if self.kind == "one each":
                kept[members[least:]] = False
            elif self.kind == "all but one":
                kept[members[: int(len(members) > least)]] = False
            elif self.kind == "random":
                kept[members[least:]] = rng.random(len(members) - least) < rng.choice(self.rates)
        return kept


masks = st.builds(
    Masks, st.sampled_from(["random", "random", "random", "one each", "all but one", "all"]), st.integers(0, 2**16)
)


def masked(model: nn.Module, groups: ChannelGroups, kept: np.ndarray) -> nn.Module:
    """The full model with the removed groups' entries set to zero in every tensor but running variances."""
    result = copy.deepcopy(model)
    alive = np.append(kept, True)
    with torch.no_grad():
        for name, tensor in result.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                continue
            for axis, labels in enumerate(groups.labels[name]):
                dead = torch.from_numpy(np.flatnonzero(~alive[labels] & (labels != KEPT)))
                tensor.index_fill_(axis, dead, 0)
    return result


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value where that is above 1."""
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all()
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))
