"""The second net: copies and submodels against the network itself, on numbers; and what its runs show of a network."""

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.coupling.comparison import in_double
from cahfp_cli.coupling.masking import check_submodel, masked
from cahfp_cli.errors import InputError, VerificationError
from cahfp_cli.models.undisturbed import undisturbed


class Net(nn.Module):
    """Two layers; `between` is what happens between them."""

    def __init__(self, between=lambda self, x: x) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.between = between

    def forward(self, x):
        return self.b(self.between(self, torch.relu(self.a(x))))


def counted(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return x * self.calls


class ChangesInput(Net):
    def forward(self, x):
        return super().forward(x.mul_(2))


REMARKS = {
    "batch statistics": (Net(lambda self, x: x - x.mean(0)), "influence one another"),
    "random draws": (Net(lambda self, x: x + torch.rand(())), "draws random numbers"),
    "random draws of Python": (Net(lambda self, x: x + random.random()), "draws random numbers"),
    "random draws of NumPy": (Net(lambda self, x: x + np.random.rand()), "draws random numbers"),
    "counts its calls": (Net(counted), "changes when it runs"),
    "changes its input": (ChangesInput(), "changes its own input"),
}


@pytest.mark.parametrize("name", REMARKS)
def test_what_measures_do_not_expect_is_said(name):
    model, said = REMARKS[name]
    before = copy.deepcopy(model.state_dict()), set(vars(model))
    remarks = analyse(model, (4,)).behaviour.remarks
    assert len(remarks) == 1 and said in remarks[0]
    assert all(tensor.equal(before[0][key]) for key, tensor in model.state_dict().items())
    assert set(vars(model)) == before[1]


def test_an_ordinary_network_has_no_remarks():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    assert analyse(model, (2, 4, 4)).behaviour.remarks == ()


def test_a_copy_that_computes_something_else_is_refused(monkeypatch):
    model = Net()
    monkeypatch.setattr("cahfp_cli.coupling.comparison.slice_module", lambda model, indices: Net())
    with pytest.raises(VerificationError, match="a copy of the network computes something else"):
        analyse(model, (4,))


def test_a_submodel_that_computes_something_else_is_refused():
    model = Net().eval()
    analysis = analyse(model, (4,))
    kept = np.arange(6) % 2 == 0
    compact, _ = cut(model, analysis, kept)
    check_submodel(model, analysis, kept, compact)
    with torch.no_grad():
        compact.a.bias += 1e-2
    with pytest.raises(VerificationError, match="removed channels at zero"):
        check_submodel(model, analysis, kept, compact, torch.randn(5, 4))


def test_groups_that_differ_by_nature_are_left_out_of_the_comparison():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    analysis = analyse(model, (4,))
    assert analysis.groups.not_mask_equivalent
    kept = np.ones(analysis.groups.count, dtype=bool)
    kept[::2] = False
    check_submodel(model, analysis, kept, cut(model, analysis, kept)[0])


def test_masked_is_zero_in_all_that_a_group_covers():
    model = Net().eval()
    analysis = analyse(model, (4,))
    zeroed = masked(model, analysis.groups, np.arange(6) >= 2)
    assert not zeroed.a.weight[:2].any() and not zeroed.a.bias[:2].any() and not zeroed.b.weight[:, :2].any()
    assert zeroed.a.weight[2:].equal(model.a.weight[2:]) and zeroed.b.weight[:, 2:].equal(model.b.weight[:, 2:])


def test_running_a_network_leaves_it_as_it_was():
    model = Net(counted)
    model.register_buffer("seen", torch.zeros(1))
    model.log, model.calls = [1], 7
    with undisturbed(model):
        model.log.append(2)
        model.calls = 8
        model.seen += 1
        model.other = 1
        model.train(False)
    assert (model.log, model.calls, float(model.seen), model.training) == ([1], 7, 0.0, True)
    assert not hasattr(model, "other")
    weight, bits = model.a.weight, model.a.weight.detach().clone()
    with in_double(model):
        assert weight.dtype == torch.float64
    assert model.a.weight is weight and weight.equal(bits)


def test_a_network_that_takes_one_sample_only_is_refused_with_the_number():
    with pytest.raises(InputError, match="does not run on 2 samples"):
        analyse(Net(lambda self, x: x if len(x) == 1 or x.is_meta else [][0]), (4,))


# What follows is of rewrites: a number in a call depends on the place and on what it says, not on how often it ran.


class PerSample(nn.Module):
    """Attention written for one sequence, with widths by number, run over the sequences of a batch in turn."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(8, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.head = nn.Linear(24, 4)

    def attend(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], 3, 4, 6).permute(1, 2, 0, 3)
        mixed = (q @ k.transpose(1, 2) * 6**-0.5).softmax(-1) @ v
        return self.out(mixed.transpose(0, 1).reshape(x.shape[0], 24))

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + torch.stack([self.attend(one) for one in x])).mean(1))


def half_of(groups):
    """A mask without every second group of each family."""
    kept = np.ones(groups.count, dtype=bool)
    for family in range(len(groups.names)):
        kept[np.flatnonzero(groups.family == family)[1::2]] = False
    return kept


def test_a_loop_over_samples_is_rewritten_for_batches_of_any_size():
    model = PerSample().eval()
    analysis = analyse(model, (6, 8))
    kept = half_of(analysis.groups)
    compact, rewrites = cut(model, analysis, kept)
    assert rewrites and not kept.all()
    for batch in (1, 2, 5, 9):
        x = torch.randn(batch, 6, 8)
        with torch.no_grad():
            expected = masked(model, analysis.groups, kept)(x)
            torch.testing.assert_close(compact(x), expected, rtol=1e-4, atol=1e-5)


def test_threads_share_a_rewritten_submodel():
    model = PerSample().eval()
    analysis = analyse(model, (6, 8))
    compact, _ = cut(model, analysis, half_of(analysis.groups))
    x = torch.randn(3, 6, 8)
    with torch.no_grad():
        expected = compact(x)
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        with torch.no_grad():
            return all(torch.allclose(compact(x[: 1 + n % 3]), expected[: 1 + n % 3], atol=1e-6) for n in range(40))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


class Recursive(nn.Module):
    """A module in a module of the same class, with another width by number in the same line."""

    def __init__(self, width, inner=None):
        super().__init__()
        self.a, self.b, self.width, self.inner = nn.Linear(4, width), nn.Linear(width, 4), width, inner

    def forward(self, x):
        x = self.b(torch.relu(self.a(x).view(-1, self.width)))
        return x if self.inner is None else self.inner(x)


def test_a_module_within_one_of_its_own_class_has_its_own_numbers():
    model = nn.Sequential(Recursive(8, Recursive(6)), nn.Linear(4, 3)).eval()
    analysis = analyse(model, (4,))
    kept = np.ones(analysis.groups.count, dtype=bool)
    inner = np.unique(analysis.groups.labels["0.inner.a.weight"][0])
    kept[inner[:3]] = False
    compact, rewrites = cut(model, analysis, kept)
    assert {(one.module, one.old, one.new) for one in rewrites} == {("0.inner", 6, 3), ("0.inner", -1, -1)} or {
        (one.module, one.old, one.new) for one in rewrites
    } == {("0.inner", 6, 3)}
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(compact(x), masked(model, analysis.groups, kept)(x))
        restored = copy.deepcopy(compact)
        torch.testing.assert_close(restored(x), compact(x), rtol=0, atol=0)


class TwoWidths(nn.Module):
    """One line says the same number for two layers, in a loop."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x):
        return sum(head(torch.relu(layer(x)).view(-1, 8)) for layer, head in zip(self.layers, self.heads, strict=True))


def test_one_place_has_one_width_for_all_of_its_calls():
    model = TwoWidths().eval()
    analysis = analyse(model, (4,))
    groups = analysis.groups
    rows = groups.labels["layers.0.weight"][0]
    assert groups.count == 8 and sorted(rows) == list(range(8))
    assert (rows == groups.labels["layers.1.weight"][0]).all() and (rows == groups.labels["heads.1.weight"][1]).all()
    check_submodel(model, analysis, np.ones(groups.count, dtype=bool), copy.deepcopy(model))
    kept = np.isin(np.arange(8), [0, 3, 4])
    compact, rewrites = cut(model, analysis, kept)
    assert {(one.old, one.new) for one in rewrites if one.old == 8} == {(8, 3)}
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(compact(x), masked(model, groups, kept)(x))


# And of conditions: what is proved runs as what was traced, whatever the caller does.


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = F.interpolate(torch.relu(self.a(x)), scale_factor=2, mode="bilinear", align_corners=False)
        return self.b(x + torch.zeros(1, device=x.device)).mean((2, 3))


@pytest.mark.parametrize("caller", ["deterministic", "autocast", "inference", "double by default", "training"])
def test_a_cut_does_not_depend_on_what_the_caller_has_switched_on(caller):
    model = Upsampling()
    analysis = analyse(model, (1, 8, 8))
    kept = np.arange(6) % 2 == 0
    mode, dtype = torch.get_deterministic_debug_mode(), torch.get_default_dtype()
    try:
        match caller:
            case "deterministic":
                torch.set_deterministic_debug_mode("warn")
                compact, _ = cut(model, analysis, kept)
            case "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    compact, _ = cut(model, analysis, kept)
            case "inference":
                with torch.inference_mode():
                    compact, _ = cut(model, analysis, kept)
            case "double by default":
                torch.set_default_dtype(torch.float64)
                compact, _ = cut(model, analysis, kept)
            case _:
                compact, _ = cut(model.train(), analysis, kept)
        assert (torch.get_deterministic_debug_mode(), torch.get_default_dtype()) != (None, None)
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.set_default_dtype(dtype)
    check_submodel(model, analysis, kept, compact)


class Skipping(nn.Module):
    """Leaves layers out while it trains: without a residual, so that widths must fit whichever are left."""

    def __init__(self, draw):
        super().__init__()
        self.first, self.layers, self.head = (
            nn.Linear(4, 8),
            nn.ModuleList(nn.Linear(8, 8) for _ in range(3)),
            nn.Linear(8, 2),
        )
        self.draw = draw

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if not self.training or self.draw() < 0.9:
                x = layer(x)
        return self.head(x)


DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "a coin": lambda: 1 - torch.bernoulli(torch.tensor(0.9)).item(),
    "uniform": lambda: torch.empty(1).uniform_().item(),
    "Python": lambda: random.random(),
    "NumPy": lambda: np.random.uniform(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_layers_left_out_at_random_are_followed_in_and_out(name):
    model = Skipping(DRAWS[name]).eval()
    analysis = analyse(model, (4,))
    again = analyse(model, (4,))
    assert all(np.array_equal(a, b) for a, b in zip(analysis.groups.family, again.groups.family, strict=True))
    labels = analysis.groups.labels
    assert np.array_equal(labels["first.weight"][0], labels["layers.2.weight"][0])  # one stream, as any may be missing
    kept = half_of(analysis.groups)
    compact, _ = cut(model, analysis, kept)
    check_submodel(model, analysis, kept, compact)
    compact.train()
    for seed in range(12):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        compact(torch.randn(3, 4)).sum().backward()
