"""Every operator rule against brute force: removing a group, one at a time and several, is zeroing it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.coupling.groups import KEPT
from cahfp_cli.coupling.registry import RULES
from cahfp_cli.coupling.rules.reshape import blocks
from cahfp_cli.errors import InputError, VerificationError
from cahfp_cli.pruning.submodel import cut
from tests.networks import Attention, Masks, difference, masked

SIDE = 4


def check(model, input_shape, widths):
    """Compare slicing with zeroing for each group alone and for many; `widths` is the number of groups on axis 0 of
    each named weight. Returns the groups."""
    torch.manual_seed(0)
    model = model.double().eval()
    analysis = analyse(model, input_shape, torch.float64)
    groups = analysis.groups
    found = {name: len(np.unique(groups.labels[name][0][groups.labels[name][0] != KEPT])) for name in widths}
    assert found == widths, groups.pinned
    x = torch.rand(3, *input_shape, dtype=torch.float64) + 0.1
    one_by_one = [np.arange(groups.count) != i for i in range(groups.count)]
    several = [Masks(kind, seed).of(groups) for kind in ("one each", "random") for seed in range(3)]
    for kept in [m for m in one_by_one if (groups.widths(m) > 0).all()] + several:
        compact = cut(model, analysis, kept)
        dead = set(groups.family[~kept].tolist())
        if not dead & set(groups.not_mask_equivalent):
            with torch.no_grad():
                assert difference(compact(x), masked(model, groups, kept)(x)) <= 1e-12
    return groups


class Between(nn.Module):
    """A convolution, the operator in question on its output (b, width, 4, 4), and a consumer of what comes out."""

    def __init__(self, operator, width=6, out=None):
        super().__init__()
        self.a = nn.Conv2d(2, width, 3, padding=1)
        self.operator = operator
        with torch.no_grad():
            shape = operator(torch.rand(2, width, SIDE, SIDE)).shape
        self.b = nn.Conv2d(shape[1], 3, 1) if len(shape) == 4 else nn.Linear(shape[-1], 3)

    def forward(self, x):
        return self.b(self.operator(self.a(x)))


def average(f):
    return lambda x: f(x).mean((2, 3))


def put_in_place(x):
    y = x.clone()
    y[:, 1] = 0
    return y


FREE, FIXED, HALF, THIRD = 6, 0, 3, 2
OPERATORS = {
    # elementwise
    "relu": (F.relu, FREE),
    "relu in place": (lambda x: F.relu_(x), FREE),
    "sigmoid: f(0) is not 0": (torch.sigmoid, FREE),
    "hardswish": (F.hardswish, FREE),
    "gelu": (F.gelu, FREE),
    "silu": (F.silu, FREE),
    "mish": (F.mish, FREE),
    "hardtanh": (F.relu6, FREE),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), FREE),
    "elu": (F.elu, FREE),
    "log sigmoid": (F.logsigmoid, FREE),
    "softplus": (F.softplus, FREE),
    "clamp": (lambda x: x.clamp(-1, 1), FREE),
    "power": (lambda x: x**2, FREE),
    "two operands": (lambda x: x * torch.tanh(x) + 1, FREE),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), FREE),
    "masked fill": (lambda x: x.masked_fill(x > 1, 0.5), FREE),
    "maximum": (lambda x: torch.maximum(x, -x), FREE),
    "max of two": (lambda x: torch.max(x, -x), FREE),
    "broadcast of space": (lambda x: x * x.mean((2, 3), keepdim=True), FREE),
    "broadcast of channels": (lambda x: x * x[:, :1], FIXED),
    "new zeros": (lambda x: x + x.new_zeros(x.shape), FREE),
    "zeros of its size": (lambda x: x + torch.ones(x.shape, dtype=x.dtype, device=x.device), FREE),
    "ones like": (lambda x: x + torch.ones_like(x), FREE),
    "softmax over space": (lambda x: F.softmax(x.flatten(2), -1).reshape(x.shape), FREE),
    "softmax over channels": (lambda x: F.softmax(x, 1), FIXED),
    "log softmax over channels": (lambda x: F.log_softmax(x, 1), FIXED),
    "cumulative sum over space": (lambda x: x.cumsum(-1), FREE),
    "cumulative sum over channels": (lambda x: x.cumsum(1), FIXED),
    # reductions
    "mean over space": (lambda x: x.mean((2, 3)), FREE),
    "sum over space, kept": (lambda x: x.sum((-1, -2), keepdim=True), FREE),
    "largest over space": (lambda x: x.amax((2, 3)), FREE),
    "max with indices": (lambda x: x.flatten(2).max(-1)[0], FREE),
    "variance and mean over space": (lambda x: torch.var_mean(x, (2, 3))[0], FREE),
    "vector norm over space": (lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), FREE),
    "log-sum-exp over space": (lambda x: x.logsumexp((2, 3)), FREE),
    "mean over channels": (lambda x: x - x.mean(1, keepdim=True), FIXED),
    "largest over channels": (lambda x: x / (1 + x.abs().amax(1, keepdim=True)), FIXED),
    "mean of everything": (lambda x: x * x.mean(), FIXED),
    "norm over channels": (lambda x: F.normalize(x, dim=1), FIXED),
    # pooling, resizing, padding
    "max pool": (lambda x: F.max_pool2d(x, 2), FREE),
    "max pool, one axis": (lambda x: F.max_pool1d(x.flatten(2), 2).unsqueeze(-1), FREE),
    "average pool": (lambda x: F.avg_pool2d(x, 2), FREE),
    "adaptive average pool": (lambda x: F.adaptive_avg_pool2d(x, 2), FREE),
    "global average pool": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), FREE),
    "adaptive max pool": (lambda x: F.adaptive_max_pool2d(x, 2), FREE),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), FREE),
    "bilinear": (lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"), FREE),
    "bicubic": (lambda x: F.interpolate(x, size=(5, 5), mode="bicubic"), FREE),
    "reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), FREE),
    "replication": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), FREE),
    "padded space": (lambda x: F.pad(x, (1, 0, 2, 1)), FREE),
    "cropped space": (lambda x: F.pad(x, (-1, 0)), FREE),
    "padded channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), FIXED),
    "pad that adds nothing": (lambda x: F.pad(x, (1, 1, 0, 0, 0, 0)), FREE),
    # views
    "flatten channels and space": (lambda x: x.flatten(1), FREE),
    "flatten space": (lambda x: x.flatten(2).transpose(1, 2).mean(1), FREE),
    "channels last and back": (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), FREE),
    "squeeze and unsqueeze": (lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).unsqueeze(-1), FREE),
    "expand space": (lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2), FREE),
    "batch and channels merged": (lambda x: x.reshape(-1, 1, SIDE, SIDE).abs().reshape(x.shape), FREE),
    "batch and space merged": (lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).reshape(-1, 16, x.shape[1]), FREE),
    "split into pairs, then merged": (lambda x: x.reshape(len(x), -1, 2, SIDE, SIDE).abs().flatten(1, 2), HALF),
    "split into halves, fixed": (lambda x: x.reshape(len(x), 2, -1, SIDE, SIDE).abs().flatten(1, 2), HALF),
    "channel shuffle": (
        lambda x: x.reshape(len(x), 2, -1, SIDE, SIDE).transpose(1, 2).reshape(len(x), -1, SIDE, SIDE),
        HALF,
    ),
    "window partition": (
        lambda x: x.reshape(len(x), -1, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, x.shape[1]).mean(1)
        .reshape(len(x), 4, -1).mean(1),
        FREE,
    ),
    "a width in the code": (lambda x: x.reshape(len(x), 6, 16).mean(-1), FIXED),
    # cutting and joining
    "concatenation": (lambda x: torch.cat([x, torch.relu(x), x.flip(2)[:, :0]], 1), FREE),
    "concatenation along space": (lambda x: torch.cat([x, -x], 3), FREE),
    "stack": (lambda x: torch.stack([x, -x], 1).sum(1), FREE),
    "stack as last axis": (lambda x: torch.stack([x, -x], -1).amax(-1), FREE),
    "chunk, added": (lambda x: sum(x.chunk(2, 1)), HALF),
    "chunk in three, added": (lambda x: sum(x.chunk(3, 1)), THIRD),
    "chunk, used apart": (lambda x: torch.cat([torch.relu(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1), None),
    "split by sizes in the code": (lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1), FIXED),
    "glu": (lambda x: F.glu(x, 1), HALF),
    "slice of channels": (lambda x: x[:, :4], FIXED),
    "slice from the end": (lambda x: x[:, -4:], FIXED),
    "every other channel": (lambda x: x[:, ::2], FIXED),
    "slice of everything": (lambda x: x[:, :100], FREE),
    "slice of space": (lambda x: x[:, :, 1:3, ::2], FREE),
    "one channel": (lambda x: x + x[:, 2:3], FIXED),
    "select": (lambda x: x[..., 0, 0], FREE),
    "unbind space": (lambda x: sum(x.unbind(-1)).unsqueeze(-1), FREE),
    "written in place": (put_in_place, FIXED),
    # no rule
    "flip of space": (lambda x: x.flip(3), FIXED),
    "roll of channels": (lambda x: x.roll(1, 1), FIXED),
    "sort": (lambda x: x.sort(1)[0], FIXED),
    "gather": (lambda x: x[:, torch.tensor([0, 1, 2, 3, 4, 5])], FIXED),
    "triangle": (lambda x: torch.tril(x), FIXED),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_between_two_convolutions(name):
    operator, width = OPERATORS[name]
    model = Between(operator)
    if width is None:  # how much is pruned is left open; what is pruned must be right
        analysis = analyse(model, (2, SIDE, SIDE))
        width = len(set(analysis.groups.labels["a.weight"][0].tolist()) - {KEPT})
    check(model, (2, SIDE, SIDE), {"a.weight": width})
