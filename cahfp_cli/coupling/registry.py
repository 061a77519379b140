"""The open registry of operator rules.

A rule is called after the operator ran, with the trace, the call and the operator's output, and returns the labels of
the output's axes: `tuple[Labels, ...]` for one tensor, a list of them (None for what is not a tensor) for several.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cahfp_cli.coupling.atoms import Atoms, Labels, fixed

Axes = tuple[Labels, ...]
Result = Axes | list[Axes | None]


@dataclass(frozen=True)
class ParameterView:
    """A tensor that is a parameter, or computed from parameters alone and of the size of this one: `dims[i]` is the
    parameter's axis behind axis i, None for an axis of length 1 that it does not have; empty where a reshape mixed
    them."""

    name: str
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Call:
    """One operator call: its arguments bound by the schema's names, with defaults filled in, and its output."""

    op: torch._ops.OpOverload
    arguments: dict[str, Any]
    output: Any
    axes_of: Callable[[torch.Tensor], Axes]
    parameter_of: Callable[[torch.Tensor], ParameterView | None]

    def axes(self, name: str) -> Axes:
        """Labels of the tensor argument `name`."""
        return self.axes_of(self.arguments[name])

    def optional_axes(self, name: str) -> Axes | None:
        """Labels of an argument that may be absent or None."""
        value = self.arguments.get(name)
        return self.axes_of(value) if isinstance(value, torch.Tensor) else None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@dataclass(frozen=True)
class Consumption:
    """A call that contracts channels with a parameter: its number among the contracting calls of a forward pass, the
    parameter (or the one that the weight is computed from) with the contracted axis, and the labels of what it read."""

    call: int
    tensor: str
    axis: int
    labels: Labels


NO_GATE = "contracted with a computed tensor, where no gate can be measured"


@dataclass
class Couplings:
    """What rules write to: the atoms, who contracts channels, and how splits were resolved.

    reading: number of the contracting call that runs, with the labels of the channels that it was given.
    """

    atoms: Atoms
    consumptions: list[Consumption] = field(default_factory=list)
    split_choice: dict[tuple[int, ...], int] = field(default_factory=dict)
    splits: list[tuple[tuple[int, ...], Labels, Labels]] = field(default_factory=list)
    reading: tuple[int, Labels] | None = None

    def consume(self, labels: Labels, weight: ParameterView | None, axis: int) -> None:
        """Note that channels are contracted with axis `axis` of a weight.

        They are pinned where it is computed from data or is a parameter in another shape, or inside a function that
        hides what it reads: their gates could not be seen, and unseen groups would look worthless.
        """
        own = weight.dims[axis] if weight is not None and weight.dims else None
        if weight is None or own is None or self.reading is None or not np.array_equal(self.reading[1], labels):
            self.atoms.pin(labels, NO_GATE)
        else:
            self.consumptions.append(Consumption(self.reading[0], weight.name, own, labels))


Rule = Callable[[Couplings, Call], Result]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators by name without overload (`convolution`, `add_`)."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in RULES:
                raise ValueError(f"operator {operator} has two rules")
            RULES[operator] = function
        return function

    return register


def fixed_like(output: Any) -> Result:
    """Every axis of every output tensor fixed: what an unknown operator gives."""
    if isinstance(output, torch.Tensor):
        return tuple(fixed(n) for n in output.shape)
    return [tuple(fixed(n) for n in o.shape) if isinstance(o, torch.Tensor) else None for o in output]
