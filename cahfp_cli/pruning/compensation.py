"""Compensation: surviving gates take over what removed groups did, and fold into the weights that read them.

A gate that is not 1 is folded into its consumers: the weight's slice along the contracted axis is multiplied by it,
W (z a) = (W z) a. The submodel's index map records the factors, so that reconstruction can take them out again.
"""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.analysis import Analysis
from cahfp_cli.coupling.copying import tensors_of
from cahfp_cli.coupling.groups import KEPT, ChannelGroups
from cahfp_cli.coupling.trace import Trace
from cahfp_cli.formats.factors import Factors
from cahfp_cli.pruning.linearised import Linearised
from cahfp_cli.significance.divergence import divergence

Mask = NDArray[np.bool_]
Gates = NDArray[np.float64]

PRODUCTS = frozenset({"convolution", "mm", "bmm", "addmm", "baddbmm"})
SAME_NUMBERS = frozenset(
    {"t", "transpose", "permute", "alias", "detach", "view", "_unsafe_view", "expand", "unsqueeze", "_to_copy", "clone"}
)
"""Operators through which a weight reaches a product as it is."""

DAMPING = 0.2
"""Of the Gauss-Newton step, as a share of the mean curvature."""
LARGEST_CHANGE = 0.5
LEAST_GATE, GREATEST_GATE = 0.25, 4.0
"""Bounds of a step and of a gate after all steps. Reconstruction divides what a client changed by the gate, so a small
one would enlarge the noise of its training."""
STEPS = (1.0, 0.5, 0.25)
"""Shares of a step that the line search tries."""
SOLVER_STEPS = 30


def foldable(model: nn.Module, analysis: Analysis) -> Mask:
    """Which groups' gates can be folded, boolean (groups,): every weight that reads the group is a parameter that
    nothing else reads, under one name.

    A weight that is computed from a parameter (a standardised one), or that is an embedding too, takes no factor.
    """
    groups = analysis.groups
    names = Counter(id(tensor) for tensor in model.state_dict(keep_vars=True).values())
    tensors = tensors_of(model)
    products = products_that_read(analysis.traces[0])
    consumers = Counter(consumer.tensor for consumer in groups.consumers)
    fits, is_read = np.ones(groups.count + 1, dtype=bool), np.zeros(groups.count + 1, dtype=bool)
    for consumer in groups.consumers:
        is_read[consumer.groups] = True
        if products.get(consumer.tensor) != consumers[consumer.tensor] or names[id(tensors[consumer.tensor])] > 1:
            fits[consumer.groups] = False
    return (fits & is_read)[:-1]


def products_that_read(trace: Trace) -> dict[str, int | None]:
    """How many products read each parameter as it is; None for one that anything else reads too."""
    found: dict[str, int | None] = {}
    made = {value for operation in trace.operations for value in operation.outputs}
    weights = {
        number: value.parameter.name
        for number, value in enumerate(trace.values)
        if value.parameter is not None and number not in made
    }
    for operation in trace.operations:
        for value in operation.inputs:
            name = weights.get(value)
            if name is None:
                continue
            if operation.name in SAME_NUMBERS:
                weights.update(dict.fromkeys(operation.outputs, name))
            elif operation.name in PRODUCTS:
                count = found.get(name, 0)
                found[name] = None if count is None else count + 1
            else:
                found[name] = None
    return found


def factors_of_tensors(groups: ChannelGroups, kept: Mask, gates: Gates) -> dict[str, tuple[Factors | None, ...]]:
    """What each weight's surviving slices are multiplied with, axis by axis as an index map wants it; only weights of
    which some factor is not 1.

    Args: gates: float64 (groups,), positive.
    """
    padded = np.append(gates, 1.0).astype(np.float32)  # label -1, KEPT, picks the last
    alive = np.append(kept, True)
    found: dict[str, tuple[Factors | None, ...]] = {}
    for name, axis in sorted({(consumer.tensor, consumer.axis) for consumer in groups.consumers}):
        labels = groups.labels[name][axis]
        along = padded[labels[alive[labels]]]
        if (along != 1.0).any():
            axes = list(found.get(name, (None,) * len(groups.labels[name])))
            axes[axis] = along
            found[name] = tuple(axes)
    return found


class FoldedWeights:
    """The weights of a network that read its groups, to be scaled by gates again and again from what they are now."""

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        """Args: groups: the network's own, as `ChannelGroups.restricted` gives them for a compact one."""
        self._groups = groups
        tensors = tensors_of(model)
        names = {consumer.tensor for consumer in groups.consumers if (consumer.groups != KEPT).any()}
        self._tensors = {name: tensors[name] for name in names}
        self._original = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def set(self, gates: Gates) -> None:
        """Scale the weights by `gates`, float64 (groups,)."""
        factors = factors_of_tensors(self._groups, np.ones(self._groups.count, dtype=bool), gates)
        for name, tensor in self._tensors.items():
            tensor.copy_(self._original[name])
            for axis, along in enumerate(factors.get(name, ())):
                if along is not None:
                    shape = [-1 if other == axis else 1 for other in range(tensor.dim())]
                    tensor.mul_(torch.from_numpy(along).to(tensor).reshape(shape))


def gauss_newton(linearised: Linearised, movable: Mask, damping: float = DAMPING) -> Gates:
    """One damped Gauss-Newton step on the divergence from the reference, in the gates of the groups still there:

        (G + damping mean(diag G) I) delta = -g,    g = E[J' (q - P)],    G = E[J' (diag q - q q') J]

    solved by conjugate gradients without forming G (Schraudolph 2002; Martens 2010).

    Args:
        linearised: logits at the current network with their Jacobian; its removed groups do not move.
        movable: boolean (groups,), which gates may change.
    Returns: delta, relative to the gates as they are, float64 (groups,), within +-`LARGEST_CHANGE`.
    """
    free = linearised.alive & torch.from_numpy(movable).to(linearised.alive.device)
    change = np.zeros(len(movable))
    if not free.any():
        return change
    jacobian, q = linearised.jacobian[free], linearised.probabilities
    samples, classes = q.shape
    ridge = damping * float(linearised.curvature()[free].mean().clamp_min(1e-12))

    def product(vector: torch.Tensor) -> torch.Tensor:
        moved = (vector @ jacobian).reshape(samples, classes)
        pulled = q * (moved - (q * moved).sum(1, keepdim=True))
        return jacobian @ pulled.flatten() / samples + ridge * vector

    right = jacobian @ (linearised.reference - q).flatten() / samples
    solution = conjugate_gradients(product, right, SOLVER_STEPS)
    change[free.cpu().numpy()] = solution.clamp(-LARGEST_CHANGE, LARGEST_CHANGE).cpu().double().numpy()
    return change


def conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, steps: int
) -> torch.Tensor:
    """Solve product(x) = right for a positive definite operator, to 1e-5 of `right` or in at most so many steps."""
    largest = float(right.abs().max())
    if largest == 0:
        return torch.zeros_like(right)
    scale = 2.0 ** math.frexp(largest)[1]  # a power of two changes no bit; squares of very small numbers would be zero
    right = right / scale
    x, residual, direction = torch.zeros_like(right), right.clone(), right.clone()
    square = first = float(right @ right)
    for _ in range(steps):
        if square <= 1e-10 * first:
            break
        image = product(direction)
        size = square / float(direction @ image)
        x += size * direction
        residual -= size * image
        renewed = float(residual @ residual)
        direction = residual + (renewed / square) * direction
        square = renewed
    return x * scale


def compensated(
    gates: Gates, change: Gates, reference: torch.Tensor, logits_at: Callable[[Gates], torch.Tensor]
) -> tuple[Gates, torch.Tensor]:
    """The gates after the largest share of `change` that lowers the measured divergence from the reference, as they
    were if none does; and the logits there.

    Args: gates, change: float64 (groups,); reference: (n, m), each row sums to 1; logits_at: measures (n, m) logits.
    """
    logits = logits_at(gates)
    now = divergence(reference, logits)
    for share in STEPS:
        trial = np.clip(gates * (1 + share * change), LEAST_GATE, GREATEST_GATE)
        moved = logits_at(trial)
        if divergence(reference, moved) < now:
            return trial, moved
    return gates, logits
