"""Errors that a user can act on. Each class carries the exit code that scripts see."""


class CahfpError(Exception):
    """What is wrong, in which file, and what to do, in one or two lines."""

    exit_code = 3


class UsageError(CahfpError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class InputError(CahfpError):
    """A file or the data in it is not what it must be: format, schema, digest, shape, non-finite numbers."""

    exit_code = 3


class BudgetError(CahfpError):
    """No submodel of this network fits the budget."""

    exit_code = 4


class VerificationError(CahfpError):
    """A result did not pass its own check, so it was not kept.

    Checks are ONNX parity, the agreement of a quantised file with the fp32 one, and the index map's round trip.
    """

    exit_code = 5


def first_line(error: BaseException) -> str:
    """The first line with text in an error's message, or the name of its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
