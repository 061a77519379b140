"""What a run did, operator by operator, as far as it must agree between a model and its slice."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cahfp_cli.coupling.meta_run import EagerMode, bind, execute, offset_of, tensors_in
from cahfp_cli.coupling.rules.pointwise import is_pointwise


def is_int_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)


def numbers_used(func: Any, bound: Mapping[str, Any]) -> tuple[str, ...]:
    """The Python numbers that an elementwise operator or a new tensor's entries are made of, as text (NaN == NaN)."""
    if not is_pointwise(func) and func.overloadpacket.__name__ not in ("full", "new_full", "scalar_tensor"):
        return ()
    return tuple(f"{name}={value!r}" for name, value in bound.items() if isinstance(value, int | float))


@dataclass(frozen=True)
class Logged:
    """One operator of a run: its name, output shapes, the numbers that it computed with, where a cut starts and whether
    it took all of the axis."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[str, ...]
    offset: tuple[int, int] | None
    whole: bool


class OperatorLog(EagerMode):  # type: ignore[no-untyped-call]
    """The operators of a run, in order; those that return no tensor are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[Logged] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = execute(func, args, kwargs or {})
        written = tensors_in([output])
        if written:
            shapes = tuple(tuple(t.shape) for t in written)
            bound = bind(func, args, kwargs or {})
            name = func.overloadpacket.__name__
            offset = offset_of(func, bound)
            whole = offset is not None and bound["self"].shape == output.shape
            self.entries.append(Logged(name, shapes, numbers_used(func, bound), offset, whole))
        return output

    def largest(self) -> int:
        """Elements of the largest tensor that an operator gave."""
        return max((math.prod(shape) for entry in self.entries for shape in entry.shapes), default=0)
