"""What shape outputs must have to be read as logits."""

from cahfp_cli.data.dataset import ONE_OUTPUT
from cahfp_cli.errors import InputError


def check_rows(shape: tuple[int, ...], samples: int, classes: int, returned: str, least: int = 2) -> None:
    """Refuse outputs that are not one row of at least `least` logits a sample.

    Raises: InputError, beginning with `returned`.
    """
    if len(shape) != 2 or shape[0] != samples or shape[1] == 0:
        raise InputError(
            f"{returned} {shape} for {samples} samples: it must give one row of logits a sample, (samples, classes). "
            "Rows for tokens or pixels, and single numbers, are not supported yet.\nPool them in a factory of your own "
            "(--model FILE.py:FACTORY); scores of weights (--criterion l2) and prune without --calibration need none."
        )
    if shape[1] < least:
        raise InputError(f"{returned} {ONE_OUTPUT}")
    if shape[1] < classes:
        raise InputError(
            f"{returned} {shape} for {samples} samples of {classes} classes: it must give one row of logits a sample, "
            "one for each class."
        )
