"""Recurrent layers, kept whole: their hidden widths are fixed, the features that they read are channels."""

from collections.abc import Sequence

import torch

from cahfp_cli.coupling.atoms import fixed
from cahfp_cli.coupling.registry import Axes, Call, Couplings, rule

LIBRARY = torch.library.Library("cahfp", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("recurrent(Tensor input, Tensor[] states, Tensor[] weights, int directions) -> Tensor[]")  # type: ignore[no-untyped-call]


def shapes_of(
    x: torch.Tensor, states: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], directions: int
) -> list[torch.Tensor]:
    """Output and final states of an LSTM, GRU or plain recurrent layer, as tensors without data.

    Raises: RuntimeError: the input is not as wide as the layer.
    """
    if x.shape[-1] != weights[0].shape[1]:
        raise RuntimeError(f"the recurrent layer reads {weights[0].shape[1]} features, not {x.shape[-1]}")
    output = x.new_empty((*x.shape[:-1], directions * states[0].shape[-1]))
    return [output, *(torch.empty_like(state) for state in states)]


LIBRARY.impl("recurrent", shapes_of, "Meta")  # type: ignore[no-untyped-call]


@rule("recurrent")
def recurrent(couplings: Couplings, call: Call) -> list[Axes | None]:
    """Ties the input's features to the first layer's weights, one for each direction; pins everything else."""
    features, weights = call.axes("input")[-1], call["weights"]
    each = len(weights) // len(call["states"][0])  # weights of one layer in one direction; that of the input is first
    readers = weights[: each * call["directions"] : each]
    for weight in readers:
        couplings.atoms.tie(features, call.axes_of(weight)[1])
        couplings.consume(features, call.parameter_of(weight), 1)
    for tensor in (*weights, *call["states"]):
        axes = call.axes_of(tensor)
        for labels in axes[:1] if any(tensor is weight for weight in readers) else axes:
            couplings.atoms.pin(labels, "hidden width of a recurrent layer")
    return [tuple(fixed(n) for n in out.shape) for out in call.output]
