"""Sixteen architectures of transformers, tiny and random: pruned exactly, or the pinned part is listed here."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.adapters import adapt
from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.coupling.coverage import coverage
from cahfp_cli.errors import InputError
from cahfp_cli.models.outputs import logits_of
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.pruning.submodel import gather_all, make_index_map
from tests.support.networks import Masks, difference, masked

library = pytest.importorskip("transformers")

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
IMAGE = {"image_size": 32, "num_labels": 5}
TOKENS, PIXELS = ((7,), torch.int64), ((3, 32, 32), torch.float32)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ZOO = {
    "BertForSequenceClassification": (TEXT, TOKENS),
    "RobertaForSequenceClassification": (TEXT, TOKENS),
    "ElectraForSequenceClassification": ({**TEXT, "embedding_size": 24}, TOKENS),
    "DistilBertForSequenceClassification": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50},
        TOKENS,
    ),
    "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, **SPECIAL}, TOKENS),
    "LlamaForCausalLM": ({**TEXT, "num_key_value_heads": 2, **SPECIAL}, TOKENS),
    "Qwen2ForCausalLM": ({**TEXT, "num_key_value_heads": 2, **SPECIAL}, TOKENS),
    "T5ForTokenClassification": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "num_labels": 5},
        TOKENS,
    ),
    "ViTForImageClassification": ({**TEXT, **IMAGE, "patch_size": 8}, PIXELS),
    "BeitForImageClassification": ({**TEXT, **IMAGE, "patch_size": 8, "use_relative_position_bias": True}, PIXELS),
    "SwinForImageClassification": (
        {**IMAGE, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
        PIXELS,
    ),
    "ConvNextForImageClassification": ({**IMAGE, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}, PIXELS),
    "ResNetForImageClassification": (
        {**IMAGE, "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "layer_type": "bottleneck"},
        PIXELS,
    ),
    "MobileNetV2ForImageClassification": ({**IMAGE, "depth_multiplier": 0.35}, PIXELS),
    "SegformerForImageClassification": (
        {**IMAGE, "hidden_sizes": [8, 12, 16, 24], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]},
        PIXELS,
    ),
    "WhisperForAudioClassification": (
        {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "max_source_positions": 10,
            "num_mel_bins": 6,
            "num_labels": 5,
        },
        ((6, 20), torch.float32),
    ),
}


def build(name):
    """A model with every vector randomised, so that no part is zero or one by construction."""
    torch.manual_seed(0)
    kind = getattr(library, name)
    fields, (shape, dtype) = ZOO[name]
    model = adapt(kind(kind.config_class(**fields))).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model, shape, dtype


@pytest.mark.parametrize("name", ZOO)
def test_architecture_is_pruned_exactly(name):
    model, shape, dtype = build(name)
    analysis = analyse(model, shape, dtype)
    groups = analysis.groups
    assert coverage(model, analysis).prunable_share >= 0.95
    x = torch.rand(3, *shape) if dtype.is_floating_point else torch.randint(0, 50, (3, *shape))

    kept = Masks("random", 1, rates=(0.55,)).of(groups)
    compact, rewrites = cut(model, analysis, kept)
    with torch.no_grad():
        assert torch.isfinite(logits_of(compact(x))).all()
    logits_of(copy.deepcopy(compact).train()(x)).square().mean().backward()

    arrays = state_arrays(model)
    index_map = make_index_map(arrays, groups, kept, "0" * 64, rewrites)
    small = state_arrays(compact)
    assert all(np.array_equal(small[tensor], array) for tensor, array in gather_all(arrays, index_map).items())

    spared = Masks("random", 1, rates=(0.55,)).of(groups, equivalent=True)
    exact, _ = cut(model, analysis, spared)
    with torch.no_grad():
        assert difference(logits_of(exact(x)), logits_of(masked(model, groups, spared)(x))) <= 1e-5


def test_analysis_of_a_transformer_is_deterministic():
    model, shape, dtype = build("GPT2LMHeadModel")
    first, second = analyse(model, shape, dtype), analyse(model, shape, dtype)
    assert first.rewritten == second.rewritten
    assert "transformer.h.0.attn: split" in first.rewritten
    assert first.groups.names == second.groups.names
    assert np.array_equal(first.groups.family, second.groups.family)


# --- models that cannot be traced, or only on real tensors ----------------------------------------------------------


class Reading(nn.Module):
    """A convolution, code of the caller's between it and the head."""

    def __init__(self, code):
        super().__init__()
        self.a, self.b, self.c, self.code = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 3, 1), code

    def forward(self, x):
        return self.c(self.code(self.b(torch.relu(self.a(x)))))


def widths_of(model):
    analysis = analyse(model, (2, 4, 4))
    return analysis, {f.name: f.groups for f in coverage(model, analysis).families}


def test_code_that_reads_values_is_traced_on_real_tensors():
    analysis, families = widths_of(Reading(lambda x: x * 2 if x.mean() > -100 else x))
    assert not analysis.on_meta
    assert families == {"a.weight": 4, "b.weight": 5}


def test_an_operator_without_shape_function_pins_what_it_touches_and_no_more():
    with torch.library._scoped_library("cahfp_zoo", "DEF") as library_:
        library_.define("mystery(Tensor x) -> Tensor")
        library_.impl("mystery", lambda x: x.flip(1), "CPU")
        analysis, families = widths_of(Reading(lambda x: torch.ops.cahfp_zoo.mystery(x)))
    assert families == {"a.weight": 4}
    assert analysis.groups.pinned["b.weight", 0] == "operator mystery has no rule"


def test_a_model_that_fails_says_so_in_one_message():
    def fail(x):
        raise KeyError("no such thing")

    with pytest.raises(InputError, match="does not run on an input of shape 2x4x4") as error:
        widths_of(Reading(fail))
    assert len(str(error.value).splitlines()) <= 2


def test_sparse_parameters_are_pinned_or_refused():
    model = Reading(lambda x: x)
    model.table = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    model.code = lambda x: x + torch.sparse.sum(model.table).to_dense()
    try:
        _, families = widths_of(model)
    except InputError as error:
        assert "does not run" in str(error)
    else:
        assert "table" not in families


def test_a_model_without_parameters_has_no_groups():
    assert widths_of(nn.Sequential(nn.ReLU(), nn.Flatten()))[1] == {}
