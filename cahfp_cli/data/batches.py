"""Cutting a data set into batches."""

from collections.abc import Iterator

import numpy as np

from cahfp_cli.data.dataset import Dataset, Labels, Samples

Seed = int | tuple[int, ...] | None


def batches(dataset: Dataset, batch_size: int, seed: Seed) -> Iterator[tuple[Samples, Labels]]:
    """Yield (x, y) of `batch_size` samples, the last one shorter, each sample once.

    The order is the data set's own when `seed` is None, else a shuffle that depends on the seed alone; a tuple such
    as (seed, epoch) gives each epoch its own.
    """
    n = len(dataset)
    order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
    for start in range(0, n, batch_size):
        chosen = order[start : start + batch_size]
        yield dataset.x[chosen], dataset.y[chosen]
