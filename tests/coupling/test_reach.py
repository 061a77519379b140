"""What no run reached stays whole, and what other data may hand to it keeps its widths."""

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.analysis import analyse, cut
from cahfp_cli.coupling.groups import KEPT
from cahfp_cli.coupling.masking import check_submodel, masked
from cahfp_cli.coupling.trace import TracerError
from cahfp_cli.device.workload import make_workload
from cahfp_cli.errors import InputError

pytestmark = pytest.mark.quick


def whole(groups, name):
    """Whether no axis of a tensor can lose anything."""
    return all((labels == KEPT).all() for labels in groups.labels[name])


class Experts(nn.Module):
    """Each sample goes to the expert that its router likes best."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)) for _ in range(4))

    def forward(self, x, h):
        chosen, out = self.router(x - 0.5).argmax(-1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            if rows.numel():
                out = out.index_add(0, rows, expert(h[rows]))
        return out


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.moe = nn.Linear(8, 12), Experts()
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        return self.head(torch.relu(self.hidden(h + self.moe(x, h))))


def test_experts_that_no_sample_was_sent_to_stay_whole():
    torch.manual_seed(3)
    model = Mixture().eval()
    analysis = analyse(model, (8,))
    groups = analysis.groups
    unreached = [k for k in range(4) if whole(groups, f"moe.experts.{k}.0.weight")]
    assert len(unreached) == 3  # the one sample of the trace went to one expert
    assert all(whole(groups, f"moe.experts.{k}.2.weight") for k in unreached)
    assert "no run" in groups.pinned[f"moe.experts.{unreached[0]}.0.weight", 0]
    assert whole(groups, "stem.weight")  # it feeds all of them
    (reached,) = {0, 1, 2, 3} - set(unreached)
    assert not whole(groups, f"moe.experts.{reached}.0.weight") and not whole(groups, "hidden.weight")
    kept = np.arange(groups.count) % 2 == 0
    compact, _ = cut(model, analysis, kept)
    x = torch.rand(64, 8)
    with torch.no_grad():
        torch.testing.assert_close(compact(x), masked(model, groups, kept)(x))


class Branch(nn.Module):
    """One of two layers, by what the input holds."""

    def __init__(self):
        super().__init__()
        self.stem, self.low, self.high, self.head = (nn.Linear(*s) for s in ((4, 6), (6, 6), (6, 6), (6, 3)))

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.low(x) if x.sum().item() < 1e9 else self.high(x))


class Early(nn.Module):
    """Stops early where it is sure."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
            if bool((x.abs() < 1e9).all()):
                break
        return self.head(x)


def test_the_branch_that_no_run_took_keeps_what_it_reads():
    groups = analyse(Branch(), (4,)).groups
    assert all(whole(groups, f"{name}.weight") for name in ("stem", "high", "low", "head"))


def test_layers_after_an_early_stop_stay_whole():
    model = Early().eval()
    analysis = analyse(model, (6,))
    assert whole(analysis.groups, "layers.1.0.weight") and whole(analysis.groups, "layers.2.2.weight")
    assert not whole(analysis.groups, "layers.0.0.weight")  # within a layer nothing else is read
    kept = np.arange(analysis.groups.count) % 2 == 0
    compact, _ = cut(model, analysis, kept)
    check_submodel(model, analysis, kept, compact)
    with torch.no_grad():
        far = torch.full((2, 6), 1e10)
        torch.testing.assert_close(compact(far), masked(model, analysis.groups, kept)(far))


class Unused(nn.Module):
    """Has a layer and a token that nothing reads, and reads no values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 6)
        self.token = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_unused_layers_stay_whole_and_cost_the_others_nothing():
    groups = analyse(Unused(), (4,)).groups
    assert whole(groups, "unused.weight") and whole(groups, "token")
    assert not whole(groups, "a.weight")


class Reshaped(nn.Module):
    """Weights read in another shape than they are stored in."""

    def __init__(self):
        super().__init__()
        self.first, self.score, self.head = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(16, 24), nn.Linear(24, 4)
        self.kernel = nn.Parameter(torch.randn(16, 12 * 9) * 0.1)

    def forward(self, x):
        x = torch.relu(nn.functional.conv2d(torch.relu(self.first(x)), self.kernel.view(16, -1, 3, 3), padding=1))
        return self.head(nn.functional.conv2d(x, self.score.weight[:, :, None, None], self.score.bias).mean((2, 3)))


def test_a_matrix_used_as_a_kernel_is_followed():
    model = Reshaped().eval()
    analysis = analyse(model, (1, 8, 8))
    groups = analysis.groups
    assert len(np.unique(groups.labels["kernel"][0])) == 16 and not whole(groups, "score.weight")
    assert "contracted with a computed tensor" in groups.pinned["first.weight", 0]
    assert {one.tensor for one in groups.consumers if (one.groups != KEPT).any()} == {"score.weight", "head.weight"}
    kept = np.arange(groups.count) % 2 == 0
    check_submodel(model, analysis, kept, cut(model, analysis, kept)[0])


def test_a_rule_that_fails_pins_and_does_not_blame_the_network(monkeypatch):
    def broken(couplings, call):
        raise IndexError("tuple index out of range")

    monkeypatch.setitem(__import__("cahfp_cli.coupling.registry", fromlist=["RULES"]).RULES, "mean", broken)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    groups = analyse(model, (1, 4, 4)).groups
    assert whole(groups, "0.weight")
    assert "does not foresee" in groups.pinned["0.weight", 0]


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_tensors_without_entries_do_no_harm(size):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model.empty = nn.Parameter(torch.zeros(size))
    model.register_buffer("none", torch.zeros(0))
    analysis = analyse(model, (4,))
    kept = np.arange(analysis.groups.count) % 2 == 0
    check_submodel(model.eval(), analysis, kept, cut(model, analysis, kept)[0])


def test_a_fault_of_the_tracer_is_not_reported_as_the_networks(monkeypatch):
    def broken(*_):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("cahfp_cli.coupling.trace.seen", broken)
    with pytest.raises(TracerError, match="cannot be noted: tuple index"):
        analyse(nn.Sequential(nn.Linear(4, 3)), (4,))


def test_a_sparse_buffer_is_followed_like_a_constant():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("mix", torch.eye(4).to_sparse())

        def forward(self, x):
            return self.b(torch.sparse.mm(self.mix, self.a(x).t()).t())

    model = Mixed().eval()
    groups = analyse(model, (4,)).groups
    assert whole(groups, "b.weight")


class InPlaceViews(nn.Module):
    """Adds, drops and exchanges axes in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.a(x)).unsqueeze_(0).transpose_(0, 2)
        return self.b(x.transpose_(0, 2).squeeze_(0))


@pytest.mark.parametrize("forward", [InPlaceViews.forward, lambda self, x: self.b(torch.vmap(self.a)(x))])
def test_views_in_place_are_followed(forward, monkeypatch):
    monkeypatch.setattr(InPlaceViews, "forward", forward)
    model = InPlaceViews().eval()
    analysis = analyse(model, (4,))
    kept = np.arange(analysis.groups.count) % 2 == 0
    compact, _ = cut(model, analysis, kept)
    check_submodel(model, analysis, kept, compact)
    with torch.no_grad():
        torch.testing.assert_close(compact(torch.ones(5, 4)), masked(model, analysis.groups, kept)(torch.ones(5, 4)))
    if forward is not InPlaceViews.forward:
        return
    assert len(np.unique(analysis.groups.labels["a.weight"][0])) == 6


def test_scripted_modules_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 6), torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 2))
    with pytest.raises(InputError, match=r"1 is a scripted module"):
        analyse(model, (4,))


class RemembersSamples(nn.Module):
    """A running mean that evaluation moves too."""

    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(8, 12), nn.Linear(12, 4)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x):
        x = torch.relu(self.enter(x))
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.head(x - self.mean)


def test_a_buffer_that_samples_change_has_a_cost_and_is_said():
    model = RemembersSamples().eval()
    analysis = analyse(model, (8,))
    assert "changes when it runs" in analysis.behaviour.remarks[0]
    workload = make_workload(analysis, dict.fromkeys(model.state_dict(), 4))
    assert workload is not None
