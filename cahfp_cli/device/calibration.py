"""Rates of a device's kernels from timed microbenchmarks.

The cost model is linear in the inverse rates, so they come out of non-negative least squares (Lawson and Hanson 1974).
Minimised is the sum over microbenchmarks of (r - 1)^2 / r with r = predicted / measured, for which twice as long is as
wrong as half as long; plain relative errors would favour predictions that are too short. What the model is not linear
in, the channel alignment and the size of the cache, is tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from cahfp_cli.device.latency import CLASSES, Kernels, Rates, streamed
from cahfp_cli.device.microbenchmarks import Microbenchmark
from cahfp_cli.device.sizes import Array

ALIGNMENTS = ((1, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 4), (16, 4))
"""(step, hard): channels computed together, and what blocked kernels want a multiple of."""
CACHES = (5e5, 1e6, 1.5e6, 2e6, 3e6, 4e6, 5e6, 6e6, 8e6, 1e7, 12e6, 16e6, 24e6, 32e6, 64e6)
"""Bytes."""
PASSES = 5
STREAMED = -2
"""The feature that depends on the size of the cache."""
LEAST_RATIO = 0.1
"""Of predicted to measured, in a weight: a microbenchmark that nothing explains must not rule the others."""


@dataclass(frozen=True)
class Fit:
    """step, hard: channel alignment. residuals: predicted over measured minus 1, float64 (microbenchmarks,)."""

    rates: Rates
    step: int
    hard: int
    residuals: Array


def fit(benchmarks: Sequence[Microbenchmark], seconds: Array) -> Fit:
    """What explains measured seconds best, float64 (microbenchmarks,), of one call each."""
    counted = {alignment: features_of(benchmarks, *alignment) for alignment in ALIGNMENTS}
    found = [
        fit_with(features, seconds, *alignment, cache)
        for (alignment, features), cache in product(counted.items(), CACHES)
    ]
    return min(found, key=lambda one: float(np.square(one.residuals).sum()))


def fit_with(counted: Array, seconds: Array, step: int, hard: int, cache: float) -> Fit:
    """The rates with this alignment, for which `counted` are the features, and a cache of so many bytes."""
    from scipy.optimize import nnls

    features = with_cache(counted, cache)
    relative = features / seconds[:, None]
    weights = np.ones(len(seconds))
    for _ in range(PASSES):
        weighted = relative * weights[:, None]
        scale = np.maximum(np.linalg.norm(weighted, axis=0), 1e-30)
        solution, _ = nnls(weighted / scale, weights)
        solution /= scale
        weights = 1 / np.sqrt(np.clip(relative @ solution, LEAST_RATIO, 1 / LEAST_RATIO))
    by_class, others = np.split(solution, [4 * len(CLASSES)])
    operation, byte, overhead, line = by_class.reshape(4, len(CLASSES))
    load, wait, reorder, reorder_call, weight, once, streaming, call = others.tolist()
    terms = (load, wait, reorder, reorder_call, weight, once, streaming)
    rates = Rates(operation, byte, overhead, line, *terms, cache, call)
    return Fit(rates, step, hard, relative @ solution - 1)


def features_of(benchmarks: Sequence[Microbenchmark], step: int, hard: int) -> Array:
    """What each rate is multiplied with, float64 (microbenchmarks, rates): by class operations, bytes, calls and lines;
    loads, waits; bytes reordered, and how many times; bytes of weights, of weights used once, of weights streamed,
    which are all of them until `with_cache`; one call."""
    return np.stack([counts_of(benchmark, step, hard) for benchmark in benchmarks])


def counts_of(benchmark: Microbenchmark, step: int, hard: int) -> Array:
    """Its row of `features_of`."""
    found = Kernels(benchmark.operators, 0, step, hard).quantities(np.zeros((1, 0)))
    by_class = [
        np.bincount(found.classes[0], weights=quantity[0], minlength=len(CLASSES))
        for quantity in (found.operations, found.moved, found.calls, found.lines)
    ]
    weights = float(found.weights.sum())
    sums = [float(quantity.sum()) for quantity in (found.loads, found.waits, found.reordered, found.reorders)]
    return np.concatenate([*by_class, sums, [weights, float(found.once.sum()), weights, 1.0]])


def with_cache(counted: Array, cache: float) -> Array:
    """The features where a cache of so many bytes keeps weights from being streamed: they depend on it in nothing else,
    so that the networks are compiled once for all sizes of it."""
    features = counted.copy()
    features[:, STREAMED] *= streamed(features[:, STREAMED], cache)
    return features
