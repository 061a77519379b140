"""What a rewrite says: pure data, so that an index map can hold it without torch."""

from dataclasses import dataclass

Number = int | float


@dataclass(frozen=True)
class Rewrite:
    """One number in the code of a module that a slice changes.

    In call number `call` of the forward of `module` (`calls.WANTED` says which calls count; its children's do), in
    training or evaluation mode, number `argument` among the arguments is `new` where the code says `old`; a multiple
    of `old`, as of a batch, becomes the same multiple of `new`.
    """

    module: str
    training: bool
    call: int
    function: str
    argument: int
    old: Number
    new: Number
