"""Where backward passes must not be taken at their word: gradients that are stopped, rows that are not samples', other
dtypes, outputs that are no rows of logits."""

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.analysis import analyse
from cahfp_cli.data.dataset import Dataset, check_fits
from cahfp_cli.errors import InputError
from cahfp_cli.models.checkpoint_io import state_arrays
from cahfp_cli.pruning.budget import Budget
from cahfp_cli.pruning.set_selection import SetOptions
from cahfp_cli.running.evaluation import evaluate
from cahfp_cli.running.logits import class_logits
from cahfp_cli.significance.consumers import Reach
from cahfp_cli.significance.gates import GatedPass, predict
from cahfp_cli.significance.reach import find_reach
from cahfp_cli.significance.registry import Evidence, find_criterion
from cahfp_cli.significance.statistics import gate_statistics
from cahfp_cli.training.curvature import measure_curvature
from cahfp_cli.training.sgd import TrainOptions, train
from tests.pruning.test_set_selection import Case
from tests.significance.test_gates import close, products, reference
from tests.support.networks import masked, randomise

SAMPLES, CLASSES = 6, 3


class NoBackward(torch.autograd.Function):
    """A function whose author never differentiated it."""

    @staticmethod
    def forward(ctx, x):
        return x * 2


class Straight(torch.autograd.Function):
    """Signs with a derivative of their own."""

    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x) * 3

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def no_grad(body, x):
    with torch.no_grad():
        return body(x)


def inference(body, x):
    with torch.inference_mode():
        features = body(x)
    return features.clone()


def decorated(body, x):
    return torch.no_grad()(body)(x)


def to_numpy_and_back(body, x):
    return torch.from_numpy(body(x).detach().numpy())


STOPS = {
    "none": lambda body, x: body(x),
    "no_grad": no_grad,
    "a decorated function": decorated,
    "inference_mode": inference,
    "detach": lambda body, x: body(x).detach(),
    "detach in place": lambda body, x: body(x).detach_(),
    "data": lambda body, x: body(x).data,
}
WITHOUT_DERIVATIVE = {
    "round": lambda body, x: torch.round(body(x) * 3) / 3,
    "sign": lambda body, x: torch.sign(body(x)),
    "classes": lambda body, x: body(x).argmax(1, keepdim=True).double() * torch.ones(1, 5, dtype=torch.float64),
    "no backward": lambda body, x: NoBackward.apply(body(x)),
    "beside another way": lambda body, x: body(x) + torch.floor(4 * body(x)),
}


class Net(nn.Module):
    """A body whose channels reach the head as `stop` says, and a hidden layer after it."""

    def __init__(self, stop):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5))
        self.mix, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)
        self.stop = stop

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.stop(self.body, x))))


def made(factory, shape, seed=3, dtype=torch.float64):
    """A network, its groups, samples and labels."""
    torch.manual_seed(seed)
    model = factory()
    randomise(model)
    model = model.to(dtype).eval()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, *shape)).astype(torch.zeros(0, dtype=dtype).numpy().dtype)
    return model, analyse(model, shape, dtype).groups, x, rng.integers(0, CLASSES, SAMPLES)


def net(stop):
    return made(lambda: Net(stop), (4,))


# --- stops of the network's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", STOPS)
def test_stops_of_gradients_are_lifted_while_gates_are_measured(how):
    """The derivative is that of what the network computes, whatever its author kept out of autograd."""
    _, groups, x, y = net(STOPS["none"])  # tracing is another matter
    expected, found = (gate_statistics(net(STOPS[name])[0], groups, x, y, batch_size=4) for name in ("none", how))
    assert (expected.curvature > 0).all()
    for name in ("curvature", "gradient", "interactions", "contributions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_lifting_leaves_the_network_and_autograd_as_they_were():
    model, groups, x, _ = net(no_grad)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    GatedPass(model, groups, torch.from_numpy(x))
    assert torch.is_grad_enabled()
    assert not model.body(torch.from_numpy(x)).detach().requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_function_with_a_derivative_of_its_own_keeps_it():
    model, groups, x, y = net(lambda body, x: Straight.apply(body(x)))
    found = gate_statistics(model, groups, x, y)
    _, ggn, _ = reference(model, groups, x, y)
    close(found.curvature, ggn.mean(0).diagonal())


def removed_alone(model, analysis, x, group):
    """What the logits lose without a group, by the masked network."""
    kept = np.ones(analysis.groups.count, dtype=bool)
    kept[group] = False
    samples = torch.from_numpy(x)
    with torch.no_grad():
        return (model(samples) - masked(model, analysis.groups, kept)(samples)).numpy()


@pytest.mark.parametrize("how", [*WITHOUT_DERIVATIVE, "by way of numpy"])
def test_what_no_gradient_reaches_is_measured_by_removal(how):
    """The curvature is then that of the line from the network to the network without the group."""
    stop = WITHOUT_DERIVATIVE.get(how, to_numpy_and_back)
    model, _, x, y = net(stop)
    analysis = analyse(model, (4,), torch.float64)
    groups = analysis.groups
    hidden = np.unique(groups.labels["body.0.weight"][0])
    reach = find_reach(model, groups, torch.from_numpy(x), 4)
    assert reach.unreached or how == "by way of numpy"
    found = gate_statistics(model, groups, x, y, batch_size=4)
    with torch.no_grad():
        p = model(torch.from_numpy(x)).softmax(1).numpy()
    for group in hidden[hidden >= 0]:
        lost = removed_alone(model, analysis, x, group)
        expected = ((p * lost**2).sum(1) - (p * lost).sum(1) ** 2).mean()
        if how == "beside another way":  # what passes through the derivative adds up with what does not
            assert found.curvature[group] > 0
        else:
            assert found.curvature[group] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (found.curvature[groups.labels["mix.weight"][0]] > 0).all()


def test_dead_channels_are_worth_nothing_and_can_go():
    model, groups, x, y = made(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)), (4,)
    )
    with torch.no_grad():
        model[0].bias[2] = -1e6
        model[2].bias[:4] = -1e6
    found = gate_statistics(model, groups, x, y)
    dead = [groups.labels["0.weight"][0][2], *groups.labels["2.weight"][0][:4]]
    assert (found.curvature[dead] == 0).all()
    assert (np.delete(found.curvature, dead) > 0).any()
    assert find_reach(model, groups, torch.from_numpy(x), 4) == Reach()
    with torch.no_grad():
        model[2].bias[4] = -1e6  # then nothing at all comes through
    assert find_reach(model, groups, torch.from_numpy(x), 4) == Reach()
    assert (gate_statistics(model, groups, x, y).curvature == 0).all()


def test_a_set_is_not_chosen_from_what_gradients_do_not_reach_as_if_it_were_free():
    """The network without derivative inside is pruned no worse than twice the same network with one."""

    def divergence_of(stop):
        torch.manual_seed(0)
        data = Dataset(np.random.default_rng(0).normal(size=(64, 4)).astype("f4"), np.zeros(64, int), CLASSES, "noise")
        model = Net(stop)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        selection = Case(model, data).select(Budget(keep=0.6), SetOptions(rounds=3, at_once=64))
        return selection.prediction.final

    fine = 64
    rounded = divergence_of(lambda body, x: torch.round(body(x) * fine) / fine)
    assert rounded < 2 * divergence_of(STOPS["none"]) + 0.01


@pytest.mark.parametrize("criterion", ["weight-fisher", "obd"])
def test_criteria_of_single_weights_lift_stops_and_refuse_what_they_cannot_reach(criterion):
    def scores(stop):
        model, groups, x, y = net(stop)
        data = Dataset(x, y, CLASSES, "noise")
        return find_criterion(criterion).function(Evidence(model, groups, state_arrays(model), data, None, 0))

    np.testing.assert_array_equal(scores(no_grad), scores(STOPS["none"]))
    for how in ("sign", "no backward"):
        with pytest.raises(InputError, match=r"gradients do not (reach|go through).*l2"):
            scores(WITHOUT_DERIVATIVE[how])


# --- rows ------------------------------------------------------------------------------------------------------------


class Constants(nn.Module):
    """Biases that a small network makes from constants, and a weight with a product of two thin matrices added."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, CLASSES)
        self.register_buffer("places", torch.linspace(-1, 1, SAMPLES)[:, None])
        self.position = nn.Sequential(nn.Linear(1, 7), nn.ReLU(), nn.Linear(7, 5))
        self.thin_in, self.thin_out = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        x = torch.tanh(self.embed(x)) + self.position(self.places)
        weight = self.hidden.weight + self.thin_out @ self.thin_in
        return self.head(torch.tanh(nn.functional.linear(x, weight, self.hidden.bias)).mean(1))


class Frames(nn.Module):
    """Convolutions over pictures of which every sample has several: in the batch axis, samples outside."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1), nn.Linear(3, CLASSES)

    def forward(self, x):
        frames = torch.tanh(self.b(torch.relu(self.a(x.flatten(0, 1)))))
        return self.head(frames.mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))


class Chunks(nn.Module):
    """Runs two samples at a time: the calls of a batch are other ones than those of a sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return torch.cat([self.b(torch.tanh(self.a(part))) for part in x.split(2)])


class Between(nn.Module):
    """The samples' axis between two others, flattened: neither one after the other nor in turn."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        rows = x.permute(1, 0, 2, 3).reshape(-1, x.shape[3])
        out = self.b(torch.tanh(self.a(rows)))
        return out.reshape(x.shape[1], x.shape[0], x.shape[2], -1).mean((0, 2))


ROWS = {
    "products of constants": (Constants, (SAMPLES, 4), True),
    "frames of samples": (Frames, (3, 2, 4, 4), False),
    "calls by the batch": (Chunks, (4,), True),
    "samples between": (Between, (2, 3, 4), True),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_not_samples_are_measured_sample_by_sample(name):
    factory, shape, alone = ROWS[name]
    model, groups, x, y = made(factory, shape)
    assert groups.count > 3
    assert find_reach(model, groups, torch.from_numpy(x), 4) == Reach(alone=alone)
    found = gate_statistics(model, groups, x, y, batch_size=4)
    one_by_one = [gate_statistics(model, groups, x[i : i + 1], y[i : i + 1]) for i in range(SAMPLES)]
    for measured in ("curvature", "gradient"):
        close(getattr(found, measured), np.mean([getattr(one, measured) for one in one_by_one], 0))
    close(found.contributions, np.concatenate([one.contributions for one in one_by_one]))
    if factory is not Constants:  # there the gate of a factor is not that of the sum
        gradient, ggn, _ = reference(model, groups, x, y)
        close(found.gradient, gradient.mean(0))
        close(products(found), ggn.mean(0))


def test_a_pass_of_several_samples_refuses_rows_that_belong_to_none():
    model, groups, x, _ = made(Constants, (SAMPLES, 4))
    gated = GatedPass(model, groups, torch.from_numpy(x[:4]))
    with pytest.raises(InputError, match="gates cannot be measured"):
        gated.gradients(gated.logits.sum())


# --- dtypes ----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Another dtype inside than the logits have."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU())
        self.head = nn.Linear(5, CLASSES)
        if how in ("bfloat16", "float64"):
            self.body.to(getattr(torch, how))

    def forward(self, x):
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                h = self.body(x)
        else:
            h = self.body(x.to(self.body[0].weight.dtype))
        logits = self.head(h.float().mean((2, 3)))
        return logits.bfloat16() if self.how == "bfloat16 logits" else logits


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float64", "bfloat16 logits"])
def test_networks_may_compute_in_another_dtype_than_their_logits_have(how):
    def statistics(kind):
        torch.manual_seed(0)
        model = Mixed(kind).eval()
        if kind == "none":
            model.body.float()
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(8, 1, 5, 5)).astype(np.float32), rng.integers(0, CLASSES, 8)
        return gate_statistics(model, analyse(model, (1, 5, 5)).groups, x, y, batch_size=3)

    found, expected = statistics(how), statistics("none")
    tolerance = 1e-5 if how == "float64" else 0.05
    close(found.curvature, expected.curvature, tolerance)
    close(products(found), products(expected), tolerance)


# --- outputs ---------------------------------------------------------------------------------------------------------


class Shaped(nn.Module):
    """One layer whose output takes the shape that is asked for."""

    def __init__(self, shape):
        super().__init__()
        self.a, self.b, self.shape = nn.Linear(4, 6), nn.Linear(6, 12), shape

    def forward(self, x):
        return self.shape(self.b(torch.tanh(self.a(x))))


OUTPUTS = {
    "a number": (lambda h: h[:, 0], "one row of logits a sample"),
    "one output": (lambda h: h[:, :1], "softmax over one entry"),
    "one output, named": (lambda h: {"logits": h[:, :1]}, "softmax over one entry"),
    "tokens": (lambda h: h.reshape(-1, 4, 3), "Rows for tokens or pixels"),
    "pixels": (lambda h: h.reshape(-1, 3, 2, 2), "Rows for tokens or pixels"),
    "no entries": (lambda h: h[:, :0], "one row of logits a sample"),
    "nothing": (lambda h: None, "returned a NoneType"),
    "a mean over the batch": (lambda h: h.mean(0, keepdim=True), "one row of logits a sample"),
    "a scalar": (lambda h: h.mean(), "one row of logits a sample"),
    "classes": (lambda h: h.round().long(), "must return logits"),
    "unnamed": (lambda h: {"boxes": h, "labels": h}, "boxes, labels"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_rows_of_logits_are_refused_with_what_to_do(name):
    shape, said = OUTPUTS[name]
    model, x, y = Shaped(shape).eval(), np.ones((4, 4), np.float32), np.zeros(4, np.int64)
    groups = analyse(model, (4,)).groups if isinstance(shape(torch.ones(1, 12)), torch.Tensor) else None
    data = Dataset(x, y, 1, "placeholders")
    with pytest.raises(InputError, match=said):
        predict(model, torch.from_numpy(x), 2)
    with pytest.raises(InputError, match=said):
        class_logits(model, x, 1, torch.device("cpu"))
    with pytest.raises(InputError, match=said):
        evaluate(model, data, 2, torch.device("cpu"))
    if groups is not None:
        with pytest.raises(InputError, match=said):
            gate_statistics(model, groups, x, y)
        with pytest.raises(InputError, match=said):
            Case(model, data).select(Budget(keep=0.5), SetOptions(rounds=1))


def test_data_do_not_fit_a_network_of_one_output_before_anything_is_run():
    data = Dataset(np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1]), 2, "binary")
    with pytest.raises(InputError, match=r"binary .* softmax over one entry[^\n]*\nGive the network two outputs"):
        check_fits(data, (2,), 1)


@pytest.mark.parametrize("stop", [no_grad, WITHOUT_DERIVATIVE["no backward"]])
def test_training_what_gradients_do_not_go_through_is_refused(stop):
    def body(x):
        return stop(model.body, x)

    model = Net(stop).float()
    model.forward = lambda x: body(x)[:, :CLASSES]
    data = Dataset(np.ones((8, 4), np.float32), np.arange(8) % CLASSES, CLASSES, "ones")
    with pytest.raises(InputError, match="gradients do not go through the model"):
        train(model, data, TrainOptions(epochs=1, batch_size=4), torch.device("cpu"))
    with pytest.raises(InputError, match="gradients do not go through the model"):
        measure_curvature(model, ["body.0.weight"], data, 2, torch.device("cpu"))


def test_labels_beyond_the_outputs_are_refused():
    model, groups, x, y = net(STOPS["none"])
    with pytest.raises(InputError, match=r"label 3, but the network gives 3 logits"):
        gate_statistics(model, groups, x, np.where(y == CLASSES - 1, CLASSES, y))
