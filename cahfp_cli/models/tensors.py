"""Torch's tensors as the arrays that files hold, and back: same type, same bits."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cahfp_cli.checkpoint.dtypes import PACKED, Array
from cahfp_cli.checkpoint.safetensors_file import check_name
from cahfp_cli.errors import InputError

PLAIN = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64}
    | {torch.int64, torch.float16, torch.float32, torch.float64, torch.complex64}
)
NAMES_AND_BITS = {  # element types that NumPy knows only through ml_dtypes, as integers of their width
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.int8, ml_dtypes.float8_e5m2),
    torch.float8_e4m3fnuz: (torch.int8, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2fnuz: (torch.int8, ml_dtypes.float8_e5m2fnuz),
    torch.float8_e8m0fnu: (torch.int8, ml_dtypes.float8_e8m0fnu),
}
FROM_NUMPY = {np.dtype(array): (bits, tensor) for tensor, (bits, array) in NAMES_AND_BITS.items()}
PAIRS = torch.float4_e2m1fn_x2
"""Two elements in one, so its last axis has half the length that a file says."""
EXTRA_STATE = "_extra_state"


def to_array(tensor: Any, name: str) -> Array:
    """A tensor as an array of its bits; where it already lies so on the CPU, a view.

    Raises: InputError: it is no tensor that a file of ours can hold.
    """
    why = why_not_stored(tensor)
    if why is not None:
        raise InputError(f"{name!r} is {why}, which safetensors files do not hold.")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    if plain.dtype in NAMES_AND_BITS:
        bits, dtype = NAMES_AND_BITS[plain.dtype]
        array: Array = plain.view(bits).numpy().view(dtype)
        return array
    if plain.dtype == PAIRS:
        halves = plain.contiguous().view(torch.uint8).numpy()
        return np.stack([halves & 15, halves >> 4], -1).reshape(*halves.shape[:-1], -1).view(PACKED["F4"])
    return np.asarray(plain.numpy())


def why_not_stored(value: object) -> str | None:
    """What is no plain tensor of a type that we store, in words; None for one that is."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} and no tensor"
    if is_lazy(value):
        return "a parameter of a lazy layer that has never run"
    if value.is_meta:
        return "a tensor without data (on the meta device)"
    if value.is_quantized:
        return f"a quantised tensor ({dtype_name(value.dtype)})"
    if value.is_nested or value.layout != torch.strided or value.is_mkldnn:
        return f"a {'nested' if value.is_nested else str(value.layout).removeprefix('torch.')} tensor"
    if hasattr(value, "__tensor_flatten__"):
        return f"a tensor inside a {type(value).__name__}"
    if value.dtype == PAIRS:
        return None if value.ndim else "a scalar of a packed type"
    return None if value.dtype in PLAIN or value.dtype in NAMES_AND_BITS else f"of type {dtype_name(value.dtype)}"


def to_tensor(array: Array) -> torch.Tensor:
    """The inverse of `to_array`; shares the array's memory, which must be writable.

    Raises: InputError: a type that torch does not have.
    """
    if array.dtype in FROM_NUMPY:
        bits, dtype = FROM_NUMPY[array.dtype]
        return torch.from_numpy(array.view(np.dtype(str(bits).removeprefix("torch.")))).view(dtype)
    if array.dtype not in PACKED.values():
        return torch.from_numpy(array)
    if array.dtype != PACKED["F4"] or not array.ndim or array.shape[-1] % 2:
        raise InputError(f"torch has no tensor for {array.dtype} of shape {list(array.shape)}: convert it to float16.")
    nibbles = array.view(np.uint8)
    return torch.from_numpy(nibbles[..., ::2] | nibbles[..., 1::2] << 4).view(PAIRS)


def saved_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict: what a checkpoint holds of it. Tied ones stand under each of their names."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}


def load_state(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Put tensors under their state-dict names into a model, in place; what they lack stays as it is.

    They are of the layout that the model's own state dict has today: some modules (torchvision's MNASNet, all batch
    norms) read the versions that `state_dict` notes beside its tensors, and take a state without them for an old one.

    Returns: the names that the model does not know.
    Raises: whatever torch or the model's own hooks raise of tensors that do not fit.
    """
    state = OrderedDict(tensors)
    state._metadata = model.state_dict(keep_vars=True)._metadata  # type: ignore[attr-defined]
    return list(model.load_state_dict(state, strict=False).unexpected_keys)


def unsaved_state(model: nn.Module) -> tuple[str, ...]:
    """The entries of a model's state dict that are no tensors, such as a `get_extra_state` may give: no checkpoint of
    ours holds them, and a network built anew has its factory's."""
    return tuple(name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor))


def state_arrays(model: nn.Module) -> dict[str, Array]:
    """Parameters and buffers by their state-dict names, as arrays of the same type and bits."""
    return {name: to_array(tensor, name) for name, tensor in saved_state(model).items()}


def check_can_be_saved(model: nn.Module) -> None:
    """What a command asks before it starts work whose result it is to save.

    Raises: InputError: a name or a tensor of the model's state that a file cannot hold; the first is named.
    """
    for name, tensor in saved_state(model).items():
        try:
            check_name(name)
        except ValueError:
            raise InputError(
                f"the model's {name!r} cannot be saved: a name has 1 to 1024 characters, none of them for control."
            ) from None
        why = why_not_stored(tensor)
        if why is not None:
            raise InputError(
                f"the model's {name!r} cannot be saved: it is {why}. Give it a type that safetensors files hold, or "
                "leave it out of the state dict (persistent=False)."
            )


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """As `torch.isfinite`, also of types that it does not know: a boolean tensor of the same shape."""
    if tensor.dtype == PAIRS:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return torch.isfinite(widened(tensor))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a type that all of torch's functions know: float8 as float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def is_constant(tensor: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether what is not finite in a tensor is so in the one that the factory made, and that is not trained."""
    if made.requires_grad or made.is_meta:
        return False
    odd = ~is_finite(tensor)
    return same_numbers(widened(tensor)[odd], widened(made.detach())[odd])


def same_numbers(left: torch.Tensor, right: torch.Tensor) -> bool:
    """As `torch.equal`, of any type that files hold, and with NaN equal to NaN."""
    if left.dtype == PAIRS and right.dtype == PAIRS:
        return torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    left, right = widened(left), widened(right)
    return left.shape == right.shape and bool(((left == right) | (left.isnan() & right.isnan())).all())


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, also where torch runs deterministically, which then knows no memory for packed types."""
    return tensor.view(torch.uint8).clone().view(PAIRS) if tensor.dtype == PAIRS else tensor.clone()


def dtype_name(dtype: torch.dtype) -> str:
    """Without the `torch.` before it."""
    return str(dtype).removeprefix("torch.")
