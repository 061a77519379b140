"""What must hold for any network and any mask: exact index maps, and a sliced model that computes the masked one."""

import copy

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cahfp_cli.coupling.groups import KEPT
from cahfp_cli.coupling.slicing import tensors_of
from cahfp_cli.pruning.index_map import gather, scatter
from cahfp_cli.pruning.submodel import cut, make_index_map
from cahfp_cli.models.checkpoint_io import state_arrays
from tests.networks import Masks, difference, examples, masked, masks, networks

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@given(network=networks(dtype=None), mask=masks)
@examples(150)
def test_the_sliced_model_computes_the_masked_model(network, mask):
    analysis = network.analyse()
    kept = mask.of(analysis.groups, equivalent=True)
    compact, zeroed = cut(network.model, analysis, kept), masked(network.model, analysis.groups, kept)
    for batch in (1, 3):
        x = network.samples(batch)
        with torch.no_grad():
            assert difference(compact(x), zeroed(x)) <= TOLERANCE[network.dtype]
