"""Cutting a module down: a copy of the user's own class with sliced tensors and its width attributes set."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling.copying import copy_with, tensors_of

Indices = Mapping[str, tuple[NDArray[np.int32] | None, ...]]
M = TypeVar("M", bound=nn.Module)


def to_meta(model: M) -> M:
    """A copy whose tensors have shapes and no data."""
    return copy_with(model, lambda name, tensor: torch.empty_like(tensor, device="meta"))


def clone(model: M) -> M:
    """A copy of a module with copies of its tensors."""
    return copy_with(model, lambda name, tensor: tensor.clone())


def slice_tensor(tensor: torch.Tensor, axes: tuple[NDArray[np.int32] | None, ...]) -> torch.Tensor:
    """The surviving indices of each axis, in order, as a contiguous copy."""
    if tensor.is_meta:
        shape = [n if index is None else len(index) for n, index in zip(tensor.shape, axes, strict=True)]
        return tensor.new_empty(shape)
    if all(index is None for index in axes):
        dense = tensor.layout == torch.strided
        return tensor.clone(memory_format=torch.contiguous_format) if dense else tensor.clone()
    for axis, index in enumerate(axes):
        if index is not None:
            tensor = tensor.index_select(axis, torch.from_numpy(index.astype(np.int64)).to(tensor.device))
    return tensor.contiguous()


def slice_module(model: M, indices: Indices) -> M:
    """The compact module: the class of `model`, its tensors cut to `indices`, its layers' width attributes set.

    Args:
        model: left as it is.
        indices: per tensor name and axis the surviving indices, increasing; tensors not named stay whole.
    """
    full = {name: (m.groups, tuple(m.weight.shape)) for name, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
    named = tensors_of(model)
    by_identity = {id(named[name]): axes for name, axes in indices.items()}  # of tied tensors one name is enough

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        axes = by_identity.get(id(named[name]))
        return tensor.clone() if axes is None else slice_tensor(tensor, axes)

    compact = copy_with(model, cut)
    for name, module in compact.named_modules():
        if isinstance(module, CONVOLUTIONS):
            set_convolution(module, *full[name])
        else:
            set_widths(module)
    return compact


CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def removes_whole_groups(groups: int, inputs_per_group: int) -> bool:
    """Whether pruning a grouped convolution drops whole groups (else: the same position in every group).

    Depthwise and ResNeXt-like convolutions (many small groups) lose groups; few large groups lose positions inside.
    """
    return groups > 1 and groups >= inputs_per_group


def set_convolution(module: Any, groups: int, full_shape: tuple[int, ...]) -> None:
    """Channels and number of groups that follow from the weight's new shape and its full one."""
    own, per_group = module.weight.shape[:2]
    if module.transposed:
        module.in_channels, module.out_channels = own, per_group * groups
        return
    if removes_whole_groups(groups, full_shape[1]):
        module.groups = own * groups // full_shape[0]
    module.out_channels, module.in_channels = own, per_group * module.groups


def set_widths(module: nn.Module) -> None:
    """Width attributes of layers that compute with them or show them."""
    match module:
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.modules.batchnorm._BatchNorm() | nn.modules.instancenorm._InstanceNorm():
            tensor = module.weight if module.affine else module.running_mean
            if tensor is not None:
                module.num_features = len(tensor)
        case nn.LayerNorm() | nn.RMSNorm():
            if module.weight is not None:
                module.normalized_shape = tuple(module.weight.shape)
        case nn.GroupNorm():
            if module.affine:
                per_group = module.num_channels // module.num_groups
                module.num_channels = len(module.weight)
                module.num_groups = module.num_channels // per_group
        case nn.RNNBase():
            module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        case nn.Embedding():
            module.num_embeddings, module.embedding_dim = module.weight.shape
        case nn.PReLU():
            module.num_parameters = len(module.weight)
