"""What a rewrite says: pure data, so that an index map can hold it without torch."""

from dataclasses import dataclass

Number = int | float


@dataclass(frozen=True)
class Rewrite:
    """One number in the code of a module that a slice changes.

    When `module` runs, in training or evaluation mode, and `function` is called at `place` (the name of a Python
    function and the line in it, counted from its first) for the `time`-th time, number `argument` among the arguments
    is `new` where the code says `old`; another number, as for a larger batch, becomes what is in the same proportion.
    """

    module: str
    training: bool
    function: str
    place: str
    time: int
    argument: int
    old: Number
    new: Number
