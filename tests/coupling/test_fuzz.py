"""Random graphs composed of every operator that has a rule: what a slice computes is what the masked model computes."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cahfp_cli.coupling.analysis import analyse, cut
from tests.coupling.test_rules import OPERATORS, REWRITTEN, SIDE
from tests.support.networks import difference, examples, masked, masks, randomise

RANDOM = {"noise by size, unused", "normal noise, unused"}
STEPS = {name: operator for name, (operator, _) in OPERATORS.items() if name not in RANDOM}
STEPS |= {name: (lambda x, code=code: code(None, x)) for name, code in REWRITTEN.items() if "attribute" not in name}
STEPS.pop("only in training")
JOINS = ("none", "add", "concatenate", "scale")


@dataclass(frozen=True)
class Step:
    """An operator, how its result joins what came before, and the width of the convolution after it; 0 for none."""

    operator: str
    join: str
    width: int


class Program(nn.Module):
    """Steps one after the other; those that do not fit the shapes that they meet are left out when it is built."""

    def __init__(self, steps):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.convolutions = nn.ModuleList()
        self.steps = []
        x = self.stem(torch.rand(2, 2, SIDE, SIDE))
        for step in steps:
            try:
                y = joined(STEPS[step.operator](x), x, step.join)
                fits = y.dim() == 4 and y.is_floating_point() and 0 < y.shape[1] <= 24 and y[0].numel() <= 2000
                layer = nn.Conv2d(y.shape[1], step.width, 1) if fits and step.width else nn.Identity()
                y = layer(y)
            except (RuntimeError, ValueError, IndexError):
                continue
            if fits:
                x = y.detach()
                self.steps.append(step)
                self.convolutions.append(layer)
        self.head = nn.Linear(x.shape[1], 3)

    def forward(self, x):
        x = self.stem(x)
        for step, layer in zip(self.steps, self.convolutions, strict=True):
            x = layer(joined(STEPS[step.operator](x), x, step.join))
        return self.head(x.mean((2, 3)))


def joined(y, x, join):
    """The result of a step and its input as one tensor."""
    if join == "none" or y.shape != x.shape:
        return y
    return {"add": x + y, "concatenate": torch.cat([x, y], 1), "scale": x * torch.sigmoid(y)}[join]


steps = st.builds(Step, st.sampled_from(sorted(STEPS)), st.sampled_from(JOINS), st.sampled_from([0, 0, 4, 6]))


@given(program=st.lists(steps, min_size=2, max_size=6), mask=masks)
@examples(60)
def test_a_slice_of_a_random_program_computes_the_masked_program(program, mask):
    torch.manual_seed(0)
    model = Program(program)
    randomise(model)
    model = model.double().eval()
    analysis = analyse(model, (2, SIDE, SIDE), torch.float64)
    compact, _ = cut(model, analysis, mask.of(analysis.groups))
    x = torch.rand(3, 2, SIDE, SIDE, dtype=torch.float64) + 0.1
    compact.train()(x)

    kept = mask.of(analysis.groups, equivalent=True)
    exact, _ = cut(model, analysis, kept)
    with torch.no_grad():
        expected, found = masked(model, analysis.groups, kept)(x), exact(x)
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(found))
    if finite.all() and np.isfinite(float(expected.abs().max())):
        assert difference(found, expected) <= 1e-9
