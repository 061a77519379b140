"""Random streams: every draw of a simulation is derived from a purpose and a key such as (seed, round, client), so that
a run that is taken up again draws what the uninterrupted one would have."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What is drawn. The numbers are part of what a seed means: never change one."""

    PARTICIPANTS = 1
    TRAINING = 2
    SCORING = 3
    SELECTION = 4
    START = 5
    DEPLOYMENT = 6
    STATISTICS = 7


def derived(purpose: Purpose, *key: int) -> int:
    """A seed in 0..2^32-1 of its own for each purpose and key."""
    return int(np.random.SeedSequence((int(purpose), *key)).generate_state(1)[0])
