"""What a rewrite says: pure data, so that an index map can hold it without torch."""

from dataclasses import dataclass

Number = int | float


@dataclass(frozen=True)
class Rewrite:
    """One number in the code of a module that a slice changes.

    Whenever `module` runs, in training or evaluation mode, and calls `function` at `place` (the name of a Python
    function, the line in it, counted from its first, and the column where the call ends), number `argument` among the
    arguments is `new` where the code says `old`; a number that no rewrite of that argument names, as for a larger
    batch, becomes what is in the same proportion. So a call is rewritten by what it says, however often and in
    whatever order it is made.
    """

    module: str
    training: bool
    function: str
    place: str
    argument: int
    old: Number
    new: Number
