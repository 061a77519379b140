"""A copy of a network shares nothing with it: what two modules share, they share in the copy, and no more."""

import functools
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cahfp_cli.coupling.copying import copy_with
from cahfp_cli.coupling.slicing import clone, slice_module
from cahfp_cli.errors import InputError

pytestmark = pytest.mark.quick


class Writer(nn.Module):
    """Puts what it saw into a container that another module reads."""

    def __init__(self, board: Any) -> None:
        super().__init__()
        self.board, self.layer = board, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.board, set | deque | list):
            self.board.clear()
        y = self.layer(x)
        match self.board:
            case set():
                self.board.add(y)
            case list() | deque():
                self.board.append(y)
            case dict():
                self.board["seen"] = y
            case _:
                self.board.seen = y
        return y


class Reader(nn.Module):
    """Adds what the other module left, twice the input if it finds nothing."""

    def __init__(self, board: Any) -> None:
        super().__init__()
        self.board = board

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = vars(self.board).get("seen") if hasattr(self.board, "__dict__") else None
        if isinstance(self.board, dict):
            found = self.board.get("seen")
        elif isinstance(self.board, set | deque | list) and self.board:
            found = next(iter(self.board))
        return 3 * x if found is None else x + found


class Record:
    """An object with attributes."""


BOARDS = {
    "empty dict": dict,
    "dict": lambda: {"other": 1},
    "OrderedDict": OrderedDict,
    "defaultdict": lambda: defaultdict(lambda: None),
    "list": list,
    "deque": lambda: deque(maxlen=3),
    "set": set,
    "object": Record,
}


@pytest.mark.parametrize("make", BOARDS.values(), ids=BOARDS)
def test_a_container_that_two_modules_share_is_one_container_in_the_copy(make: Any) -> None:
    board = make()
    model = nn.Sequential(Writer(board), Reader(board)).eval()
    x = torch.randn(5, 4)
    expected = model(x)
    copied = slice_module(model, {})
    assert copied[0].board is copied[1].board is not board
    with torch.no_grad():
        model[0].layer.weight.zero_()  # the copy must not see this
        torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


WAYS = ("closure", "closure of a closure", "method", "partial", "weak reference", "object", "default value")


def scaled_by(model: nn.Module) -> dict[str, Any]:
    """Functions that reach the network in as many ways as code has."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x * model.scale

    def nested(x: torch.Tensor) -> torch.Tensor:
        return plain(x)

    def scale(x: torch.Tensor, by: nn.Module) -> torch.Tensor:
        return x * by.scale

    back = weakref.ref(model)

    class Caller:
        def __init__(self) -> None:
            self.model = model

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.model.scale

    return {
        "closure": plain,
        "closure of a closure": nested,
        "method": model.times,
        "partial": functools.partial(scale, by=model),
        "weak reference": lambda x: x * back().scale,
        "object": Caller(),
        "default value": lambda x, by=model: x * by.scale,
    }


class Scaled(nn.Module):
    """Multiplies by a parameter, through a function that it keeps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.apply_it = scaled_by(self)[how]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_it(x)


@pytest.mark.parametrize("how", WAYS)
def test_what_reaches_the_network_reaches_its_copy(how: str) -> None:
    model = Scaled(how)
    tripled = copy_with(model, lambda name, tensor: 3 * tensor)
    np.testing.assert_array_equal(tripled(torch.ones(3)).detach(), 6.0)
    np.testing.assert_array_equal(model(torch.ones(3)).detach(), 2.0)


def test_a_hook_that_closes_over_the_network_works_on_the_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    seen: list[torch.Tensor] = []
    model.owner = Record()
    model.owner.seen = seen
    model[0].register_forward_hook(lambda module, given, made: seen.append(made))
    copied = clone(model)
    copied(torch.ones(1, 3))
    assert not seen
    assert len(copied.owner.seen) == 1
    kept = nn.Sequential(nn.Linear(3, 3))
    kept.seen = []
    kept[0].register_forward_pre_hook(lambda module, given: None)
    kept.remember = kept.seen.append
    again = clone(kept)
    again.remember(1)
    assert again.seen == [1]
    assert kept.seen == []


def test_computed_tensors_locks_and_generators_are_copied() -> None:
    model = nn.Linear(3, 3)
    model.doubled, model.lock, model.again = model.weight * 2, threading.Lock(), threading.RLock()
    model.random = torch.Generator().manual_seed(5)
    copied = clone(model)
    np.testing.assert_array_equal(copied.doubled.detach(), 2 * model.weight.detach())
    assert copied.lock is not model.lock
    with copied.lock, copied.again:
        assert not model.lock.locked()
    assert torch.rand(2, generator=copied.random).equal(torch.rand(2, generator=torch.Generator().manual_seed(5)))


def test_what_has_no_copy_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.rows = (i for i in range(3))
    with pytest.raises(InputError, match=r"Sequential\.rows holds what has no copy .*generator"):
        clone(model)


def test_copies_do_not_depend_on_what_libraries_add_to_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "__deepcopy__", lambda self, memo: self, raising=False)
    monkeypatch.setattr(nn.Module, "__getstate__", lambda self: vars(self).copy(), raising=False)
    model = nn.Sequential(nn.Linear(3, 3))
    model.lock = threading.Lock()
    copied = clone(model)
    assert copied is not model and copied[0] is not model[0]
