"""What must hold for any network and any mask: exact index maps, and a sliced model that computes the masked one."""

import numpy as np
import torch
from hypothesis import given
from torch import nn

from cahfp_cli.coupling.analysis import cut
from cahfp_cli.coupling.copying import tensors_of
from cahfp_cli.formats.gathering import gather, scatter
from cahfp_cli.models.tensors import state_arrays
from cahfp_cli.pruning.submodel import make_index_map
from cahfp_cli.significance.gates import ConsumerInputs
from tests.support.networks import Masks, difference, examples, masked, masks, networks

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DIGEST = "0" * 64


def bits(arrays):
    return {name: (array.shape, array.dtype, array.tobytes()) for name, array in arrays.items()}


@given(network=networks(dtype=None), mask=masks)
@examples(60)
def test_the_sliced_model_computes_the_masked_model(network, mask):
    analysis = network.analyse()
    kept = mask.of(analysis.groups, equivalent=True)
    compact, zeroed = cut(network.model, analysis, kept)[0], masked(network.model, analysis.groups, kept)
    for batch in (1, 3):
        x = network.samples(batch)
        with torch.no_grad():
            assert difference(compact(x), zeroed(x)) <= TOLERANCE[network.dtype]


@given(network=networks(), mask=masks)
@examples(15)
def test_the_sliced_model_trains_a_step(network, mask):
    analysis = network.analyse()
    compact = cut(network.model, analysis, mask.of(analysis.groups))[0]

    def learning(model):
        model.train()
        loss = nn.functional.cross_entropy(model(network.samples(3)), torch.tensor([0, 1, 2]))
        loss.backward()
        assert torch.isfinite(loss)
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    assert learning(compact) == learning(network.model)
    assert all(torch.isfinite(p.grad).all() for p in compact.parameters() if p.grad is not None)
    torch.optim.SGD(compact.parameters(), 0.01).step()
    with torch.no_grad():
        assert torch.isfinite(compact(network.samples(3))).all()


@given(network=networks(), mask=masks)
@examples(15)
def test_gather_after_scatter_is_exact_to_the_bit(network, mask):
    analysis = network.analyse()
    kept = mask.of(analysis.groups)
    tensor_maps = make_index_map(state_arrays(network.model), analysis.groups, kept, DIGEST).tensors
    whole, compact = state_arrays(network.model), state_arrays(cut(network.model, analysis, kept)[0])
    assert bits({name: gather(whole[name], entry) for name, entry in tensor_maps.items()}) == bits(compact)
    rng = np.random.default_rng(mask.seed)
    for name, entry in tensor_maps.items():
        trained = np.asarray(rng.normal(size=compact[name].shape) * 100).astype(compact[name].dtype)
        into = whole[name].copy()
        scatter(trained, entry, into)
        assert bits({name: gather(into, entry)}) == bits({name: trained})
        untouched = np.ones(into.shape, dtype=bool)
        untouched[np.ix_(*(range(n) if i is None else i for i, n in zip(entry.axes, into.shape, strict=True)))] = False
        assert np.array_equal(into[untouched], whole[name][untouched])


@given(network=networks())
@examples(15)
def test_one_group_in_every_family_is_enough(network):
    analysis = network.analyse()
    kept = Masks("one each", 0).of(analysis.groups)
    assert (analysis.groups.widths(kept) == 1).all()
    compact = cut(network.model, analysis, kept)[0]
    for batch in (1, 3):
        with torch.no_grad():
            assert torch.isfinite(compact(network.samples(batch))).all()


@given(network=networks(), mask=masks)
@examples(15)
def test_tied_weights_stay_tied(network, mask):
    analysis = network.analyse()
    compact = cut(network.model, analysis, mask.of(analysis.groups))[0]

    def partners(model):
        tensors = tensors_of(model)
        return {name: sorted(other for other in tensors if tensors[other] is tensors[name]) for name in tensors}

    assert partners(compact) == partners(network.model)
    assert all(tensor is not tensors_of(network.model)[name] for name, tensor in tensors_of(compact).items())


class Scaled(ConsumerInputs):
    """Zeroes the removed groups in the input of every consumer."""

    def __init__(self, groups, kept):
        super().__init__(groups)
        self.alive = torch.from_numpy(np.append(kept, True))

    def watch(self, consumer, x, axis):
        watched = super().watch(consumer, x, axis)
        alive = self.alive[consumer.groups].to(x.dtype)
        return watched * alive.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@given(network=networks(dtype=torch.float64), mask=masks)
@examples(30)
def test_what_consumers_read_is_all_there_is_of_a_group(network, mask):
    groups = network.analyse().groups
    kept = mask.of(groups, equivalent=True)
    x = network.samples(3)
    for parameter in network.model.parameters():
        parameter.requires_grad_(True)
    with Scaled(groups, kept):
        gated = network.model(x)
    with torch.no_grad():
        assert difference(gated.detach(), masked(network.model, groups, kept)(x)) <= 1e-12


@given(network=networks())
@examples(10)
def test_analysis_is_deterministic_and_leaves_the_model_alone(network):
    before, training = bits(state_arrays(network.model)), network.model.training
    first, second = network.analyse().groups, network.analyse().groups
    assert np.array_equal(first.family, second.family)
    assert first.names == second.names
    assert [(c.call, c.tensor, c.axis) for c in first.consumers] == [
        (c.call, c.tensor, c.axis) for c in second.consumers
    ]
    assert bits(state_arrays(network.model)) == before
    assert network.model.training == training
