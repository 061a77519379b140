"""Batch-norm statistics measured anew, against explicit means and variances of batches in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.errors import InputError
from cahfp_cli.training.recalibration import recalibrate
from tests.support.networks import Residual, randomise

SAMPLES = 22


class Net(nn.Module):
    """Two norms behind convolutions, one behind a dropout and a linear layer, one that evaluation never runs."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.block = Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)))
        self.drop, self.linear, self.last = nn.Dropout(0.5), nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=None)
        self.head = nn.Linear(5, 3)
        self.auxiliary = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.block(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        x = self.linear(self.drop(x))
        return self.head(torch.relu(self.last(x)) + (self.auxiliary(x) if self.training else 0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    randomise(model)
    return model.double().eval()


def samples(count=SAMPLES):
    return np.random.default_rng(0).normal(1.0, 2.0, (count, 2, 6, 6))


def moments(x):
    """Mean and unbiased variance over everything but the channels."""
    flat = x.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=1)


def explicit(net, x, batch_size):
    """Statistics of the three norms that run, by name: the mean over batches of their means and unbiased variances."""
    seen = {"norm": [], "block.body.1": [], "last": []}

    def normed(name, x):
        module = net.get_submodule(name)
        seen[name].append(moments(x))
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean = moments(x)[0].reshape(shape)
        variance = x.transpose(0, 1).flatten(1).var(1, correction=0).reshape(shape)
        scaled = (x - mean) / torch.sqrt(variance + module.eps)
        return scaled * module.weight.reshape(shape) + module.bias.reshape(shape)

    with torch.no_grad():
        for batch in torch.from_numpy(x).split(batch_size):
            if len(batch) > 1:
                a = torch.relu(normed("norm", net.stem(batch)))
                b = torch.relu(a + normed("block.body.1", net.block.body[0](a)))
                normed("last", net.linear(b.mean((2, 3))))
    return {name: tuple(torch.stack(part).mean(0) for part in zip(*found, strict=True)) for name, found in seen.items()}


@pytest.mark.parametrize("batch_size", [2, 7, 10, SAMPLES - 1, 64])
def test_statistics_are_the_mean_of_those_of_the_batches(net, batch_size):
    before = copy.deepcopy(net)
    assert recalibrate(net, samples(), batch_size) == 3
    for name, (mean, variance) in explicit(before, samples(), batch_size).items():
        norm = net.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(norm.running_mean, before.get_submodule(name).running_mean, rtol=0.01)


def test_nothing_else_changes(net):
    before = copy.deepcopy(net)
    recalibrate(net, samples(), 8)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name))
        assert parameter.grad is None and parameter.requires_grad
    assert not any(module.training for module in net.modules())
    assert [m.momentum for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [
        0.3,
        0.1,
        None,
        0.1,
    ]


def test_a_norm_that_does_not_run_keeps_its_statistics(net):
    before = copy.deepcopy(net.auxiliary)
    recalibrate(net, samples(), 8)
    for name, buffer in net.auxiliary.named_buffers():
        assert torch.equal(buffer, before.get_buffer(name)), name
    assert recalibrate(net, samples(), 1) == 0  # no batch is large enough


def test_the_same_samples_give_the_same_bits_and_what_was_measured_before_does_not_matter(net):
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module is not other.auxiliary:
            module.running_mean += 7
            module.running_var *= 3
    for model in (net, other):
        recalibrate(model, samples(), 8)
    for (name, buffer), found in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, found), name


def test_a_last_batch_of_one_is_left_out(net):
    other = copy.deepcopy(net)
    recalibrate(net, samples(17), 8)
    recalibrate(other, samples(17)[:16], 8)
    for buffer, found in zip(net.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, found)


def test_a_network_without_norms_that_keep_statistics_has_none_to_measure():
    layers = [
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
    ]
    model = nn.Sequential(*layers).double().train()
    before = copy.deepcopy(model.state_dict())
    assert recalibrate(model, samples(1), 8) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_sample_is_refused_before_anything_changes(net):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="cannot be measured on one sample"):
        recalibrate(net, samples(1), 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(net, value):
    x = samples()
    x[9, 0, 2, 2] = value
    with pytest.raises(InputError, match="NaN or Inf on the calibration data"):
        recalibrate(net, x, 8)


def test_the_count_of_training_batches_stays(net):
    net.norm.num_batches_tracked.fill_(7)
    before = {name: int(count) for name, count in net.named_buffers() if name.endswith("num_batches_tracked")}
    assert recalibrate(net, samples(), 8) == 3
    assert {name: int(net.get_buffer(name)) for name in before} == before
