"""Adapters compute what the module they stand in for computes, and can lose heads."""

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.adapters import MultiheadAttention, adapt
from cahfp_cli.coupling.analysis import analyse, check_slice
from cahfp_cli.coupling.copying import copy_with
from cahfp_cli.coupling.slicing import slice_module
from cahfp_cli.significance.statistics import gate_statistics

pytestmark = pytest.mark.quick


def attention(seed: int, **options: object) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(24, 4, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5)
    return module.double().eval()


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.full((5, 5), -torch.inf).triu(1).double()},
    "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "by head": {"attn_mask": torch.randn(3 * 4, 5, 5).double()},
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0, 0, 0, 0, 1]], dtype=torch.bool)},
    "both": {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0, 0, 0, 0, 1]], dtype=torch.bool),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_adapter_equals_the_original(mask: str, need_weights: bool, batch_first: bool, cross: bool) -> None:
    original = attention(0, batch_first=batch_first)
    x = torch.randn(3, 5, 24).double()
    other = torch.randn(3, 5, 24).double() if cross else x
    if not batch_first:
        x, other = x.transpose(0, 1), other.transpose(0, 1)
        other = other if cross else x
    expected, expected_weights = original(x, other, other, need_weights=need_weights, **MASKS[mask])
    found, weights = MultiheadAttention(original)(x, other, other, need_weights=need_weights, **MASKS[mask])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)
    else:
        assert weights is None and expected_weights is None


def test_attention_adapter_takes_a_single_sequence() -> None:
    original = attention(1, bias=False)
    x = torch.randn(5, 24).double()
    for found, expected in zip(MultiheadAttention(original)(x, x, x), original(x, x, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_that_the_adapter_does_not_cover_is_left_alone(options: dict[str, object]) -> None:
    model = nn.Sequential(nn.MultiheadAttention(24, 4, **options))  # type: ignore[arg-type]
    assert isinstance(adapt(model)[0], nn.MultiheadAttention)


class Encoder(nn.Module):
    """Patches, two of torch's own encoder layers, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 4, 4)
        layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


def test_encoder_layers_of_torch_lose_heads_and_hidden_units_exactly() -> None:
    torch.manual_seed(2)
    original = Encoder().double().eval()
    names = list(original.state_dict())
    x = torch.rand(3, 1, 8, 8).double()
    with torch.no_grad():
        expected = original(x)
        model = adapt(original)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert list(model.state_dict()) == names
    analysis = analyse(model, (1, 8, 8), torch.float64)
    groups = analysis.groups
    heads = groups.labels["layers.layers.0.self_attn.in_proj_weight"][0].reshape(3, 4, 6)
    assert (heads >= 0).all() and len(np.unique(heads)) == 4 and (heads == heads[:1, :, :1]).all()

    kept = np.ones(groups.count, dtype=bool)
    for family, _ in enumerate(groups.names):
        if family not in groups.not_mask_equivalent:
            kept[np.flatnonzero(groups.family == family)[::2]] = False
    check_slice(model, analysis, kept)
    indices = groups.indices(kept)

    def masked(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        for axis, index in enumerate(indices[name]):
            if index is not None:
                gone = sorted(set(range(tensor.shape[axis])) - set(index.tolist()))
                tensor.index_fill_(axis, torch.tensor(gone), 0)
        return tensor

    with torch.no_grad():
        torch.testing.assert_close(slice_module(model, indices)(x), copy_with(model, masked)(x), rtol=1e-9, atol=1e-12)
    statistics = gate_statistics(model, groups, x.numpy(), np.array([0, 1, 2]))
    assert (statistics.curvature > 0).all()
