"""What a network costs on a device, as a function of how many channel groups each family keeps.

A workload is the network reduced to sizes: every axis length is an affine function of the widths, so every count of
elements is a product of such functions, and everything a budget limits is a sum of those products. They are compiled
once into index arrays; evaluating candidates is then a few NumPy operations on a whole batch of them.

Latency is a roofline for each operator, plus overheads:

    seconds = call + sum over operators of max(2 macs' / reached_peak, bytes / reached_bandwidth) + operator overhead

- macs' counts the width-dependent axes rounded up to the profile's alignment step.
- bytes are the activations read and written, and the operator's weights too once the weights of the whole network
  exceed the cache: every call walks through all weights in the same order, so a cache that is too small for all of
  them has evicted each before it is needed again. Below that size they stay from call to call and cost nothing.
- A "free" operator is folded or fused into a neighbour: no time, no overhead. What it stores still counts.

Every term grows with every width, so every cost does (fewer channels never cost more), which selection relies on; only
the memory of ONNX Runtime's arena is not quite monotone (device/arena.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.device.arena import Arena, Layout, Schedule
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.sizes import Axis, Size

Array = NDArray[np.float64]
T = TypeVar("T")
Kind = Literal["conv", "depthwise", "matmul", "memory", "free"]
"""memory: moves bytes (pool, add, concat); free: folded or fused into a neighbour (batch norm, activation, reshape)."""

ITEM_BYTES = 4
"""Activations and weights of operators are fp32."""
CONTAINER_BYTES = 8 * 1024
CONTAINER_BYTES_PER_OPERATOR = 256
"""An ONNX file beside its weights: exported chains of conv, norm and relu took 230 bytes for each operator traced."""


@dataclass(frozen=True)
class Operator:
    """One operator at batch 1. macs: multiply-accumulates; reads, writes, weights: elements; each a sum of sizes."""

    name: str
    kind: Kind
    macs: tuple[Size, ...] = ()
    reads: tuple[Size, ...] = ()
    writes: tuple[Size, ...] = ()
    weights: tuple[Size, ...] = ()


@dataclass(frozen=True)
class Workload:
    """A network as a device sees it.

    full_widths: (families,) groups of the unpruned network; parameters: each stored tensor, buffers included, with its
    bytes per element; buffers: activations; live: for each step of execution, the buffers that hold data during it.
    """

    operators: tuple[Operator, ...]
    families: int
    full_widths: tuple[int, ...]
    parameters: tuple[tuple[Size, int], ...]
    buffers: tuple[Size, ...] = ()
    live: tuple[tuple[int, ...], ...] = ()
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Cost:
    """Costs of one or many candidates; each array has the shape of the widths without their last axis.

    memory_bytes: all stored tensors plus activation_bytes, the peak of the activations: what ONNX Runtime holds where
    the profile says that it computes on the CPU (device/arena.py), else what is live at once, without workspace;
    storage_bytes: all stored tensors plus the container around them; macs as computed, without alignment; params:
    elements of all stored tensors.
    latency_seconds is None without a device.
    """

    latency_seconds: Array | None
    memory_bytes: Array
    storage_bytes: Array
    macs: Array
    params: Array
    activation_bytes: Array


@dataclass(frozen=True)
class Breakdown:
    """Seconds by operator, shape (..., operators) in the workload's order; the call overhead belongs to none."""

    names: tuple[str, ...]
    compute: Array
    memory: Array
    overhead: Array
    call_overhead: float

    @property
    def seconds(self) -> Array:
        """The longer of computing and moving bytes, plus the overhead."""
        return np.maximum(self.compute, self.memory) + self.overhead


class CostModel:
    """A workload compiled for one device (or for none: then there is no latency).

    alignment: channels that are computed together; a width inside such a step costs as much as one at its end.
    full_widths: int64 (families,), and full: their cost.
    """

    def __init__(self, workload: Workload, profile: DeviceProfile | None) -> None:
        _check(workload)
        operators = workload.operators
        timed = [operator for operator in operators if operator.kind != "free"]
        live = [tuple(workload.buffers[index] for index in step) for step in workload.live] or [()]
        self.workload = workload
        self._profile = profile
        self._timed = np.array([index for index, operator in enumerate(operators) if operator.kind != "free"], int)
        self._container = CONTAINER_BYTES + CONTAINER_BYTES_PER_OPERATOR * len(operators)

        totals = [
            [(size, 1) for operator in operators for size in operator.macs],
            [(size, 1) for size, _ in workload.parameters],
            list(workload.parameters),
        ]
        peaks = [[(size, ITEM_BYTES) for size in step] for step in live]
        activations = [[(size, ITEM_BYTES) for size in (*operator.reads, *operator.writes)] for operator in timed]
        weights = [[(size, ITEM_BYTES) for size in operator.weights] for operator in timed]
        self._sums = _Sums([*totals, *peaks, *activations, *weights], workload.families)
        self._parts = list(np.cumsum([len(totals), len(peaks), len(timed)]))

        self.alignment = 1 if profile is None or profile.alignment is None else int(profile.alignment.step.value)
        macs = [[(size, 1) for size in operator.macs] for operator in timed]
        self._macs = _Sums(macs, workload.families, self.alignment)
        if profile is not None:
            self._peak, self._bandwidth = profile.compute.fp32.reached, profile.memory.reached
            self._cache = profile.memory.cache.si if profile.memory.cache is not None else 0.0
            self._operator_overhead, self._call_overhead = profile.overheads.operator.si, profile.overheads.call.si
        self._arena = _arena_of(workload, profile)
        self.full_widths = np.array(workload.full_widths, np.int64)
        self.full = self.cost(self.full_widths)

    def cost(self, widths: NDArray[Any]) -> Cost:
        """All costs of `widths`, shape (families,) or (batch, families): groups kept, not negative.

        Raises ValueError for another shape.
        """
        batch, shape = self._batch(widths)
        totals, peaks, activations, weights = np.split(self._sums(batch), self._parts, axis=1)
        macs, params, stored = totals.T
        activations_peak = peaks.max(axis=1) if self._arena is None else self._arena(batch)
        latency = None
        if self._profile is not None:
            compute, memory = self._times(batch, activations, weights)
            fixed = self._call_overhead + len(self._timed) * self._operator_overhead
            latency = (np.maximum(compute, memory).sum(axis=1) + fixed).reshape(shape)
        return Cost(
            latency_seconds=latency,
            memory_bytes=(stored + activations_peak).reshape(shape),
            activation_bytes=activations_peak.reshape(shape),
            storage_bytes=(stored + self._container).reshape(shape),
            macs=macs.reshape(shape),
            params=params.reshape(shape),
        )

    def breakdown(self, widths: NDArray[Any]) -> Breakdown:
        """Latency by operator of `widths`, shape (families,) or (batch, families).

        Raises ValueError for another shape, or if the model was compiled without a profile.
        """
        if self._profile is None:
            raise ValueError("a cost model without a profile has no latency")
        batch, shape = self._batch(widths)
        _, _, activations, weights = np.split(self._sums(batch), self._parts, axis=1)
        times = np.zeros((3, len(batch), len(self.workload.operators)))
        times[:2, :, self._timed] = self._times(batch, activations, weights)
        times[2, :, self._timed] = self._operator_overhead
        compute, memory, overhead = times.reshape(3, *shape, -1)
        names = tuple(operator.name for operator in self.workload.operators)
        return Breakdown(names, compute, memory, overhead, self._call_overhead)

    def _times(self, batch: Array, activations: Array, weights: Array) -> tuple[Array, Array]:
        """Seconds of computing and of moving bytes, each (batch, timed operators) like the bytes given."""
        streams = weights.sum(axis=1, keepdims=True) > self._cache
        return self._macs(batch) * (2 / self._peak), (activations + weights * streams) / self._bandwidth

    def _batch(self, widths: NDArray[Any]) -> tuple[Array, tuple[int, ...]]:
        if widths.ndim not in (1, 2) or widths.shape[-1] != self.workload.families:
            raise ValueError(f"widths of shape {widths.shape} for a workload of {self.workload.families} families")
        return np.atleast_2d(np.asarray(widths, np.float64)), widths.shape[:-1]


def compile_workload(workload: Workload, profile: DeviceProfile | None) -> CostModel:
    """Prepare `workload` for many evaluations on one device.

    Raises ValueError if the workload names a family, a buffer or a kind that it does not have.
    """
    return CostModel(workload, profile)


def _arena_of(workload: Workload, profile: DeviceProfile | None) -> Arena | None:
    """ONNX Runtime's arena on the CPU; None where something else computes, or the schedule is not known.

    Its convolutions work in blocks of `alignment.step` channels where the profile has a hard alignment.
    """
    if profile is None or workload.schedule is None or profile.runtime.provider != "CPUExecutionProvider":
        return None
    layout = Layout(threads=profile.runtime.threads)
    if profile.alignment is not None and profile.alignment.hard.value > 1:
        step, hard = profile.alignment.step, profile.alignment.hard
        layout = Layout(int(step.value), int(hard.value), profile.runtime.threads)
    return Arena(workload.schedule, workload.families, layout)


class _Sums:
    """Several sums of weighted sizes at once: called with widths (batch, families), returns (batch, sums).

    Counts stay below 2^53, so float64 holds them exactly and the order of summation does not matter.
    """

    def __init__(self, sums: Sequence[Sequence[tuple[Size, int]]], families: int, step: int = 1) -> None:
        sizes = _Numbering(size for terms in sums for size, _ in terms)
        axes = _Numbering(axis for size in sizes.items for axis in size.axes)
        one = axes[Axis(1)]  # fills up sizes of fewer axes than the largest
        depth = max((len(size.axes) for size in sizes.items), default=1)
        padded = [[*(axes[axis] for axis in size.axes), *[one] * (depth - len(size.axes))] for size in sizes.items]
        self._factors = np.array(padded, int).reshape(-1, depth).T

        self._constants = np.array([axis.constant for axis in axes.items], np.float64)
        self._multiplicities = np.zeros((families, len(axes.items)))
        for index, axis in enumerate(axes.items):
            for family, multiplicity in axis.terms:
                self._multiplicities[family, index] += multiplicity
        # Only axes that depend on the widths are channels; the others are extents of kernels and images.
        self._steps = np.array([step if axis.terms else 1 for axis in axes.items], np.float64) if step > 1 else None

        # reduceat cannot sum nothing, so every sum gets one term of weight 0.
        terms = [[*((sizes[size], weight) for size, weight in sum_), (0, 0)] for sum_ in sums]
        self._terms = np.array([size for sum_ in terms for size, _ in sum_], int)
        self._weights = np.array([weight for sum_ in terms for _, weight in sum_], np.float64)
        self._starts = np.cumsum([0, *(len(sum_) for sum_ in terms)])[:-1]
        self._empty = not sizes.items

    def __call__(self, widths: Array) -> Array:
        if self._empty:
            return np.zeros((len(widths), len(self._starts)))
        lengths = widths @ self._multiplicities + self._constants
        if self._steps is not None:
            lengths = np.ceil(lengths / self._steps) * self._steps
        sizes = lengths.take(self._factors[0], axis=1)
        for factor in self._factors[1:]:
            sizes *= lengths.take(factor, axis=1)
        terms = sizes.take(self._terms, axis=1)
        terms *= self._weights
        return np.add.reduceat(terms, self._starts, axis=1)


class _Numbering(Generic[T]):
    """Distinct items in order of first appearance, each with its number."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = list(dict.fromkeys(items))
        self._numbers = {item: number for number, item in enumerate(self.items)}

    def __getitem__(self, item: T) -> int:
        if item not in self._numbers:
            self._numbers[item] = len(self.items)
            self.items.append(item)
        return self._numbers[item]


def _check(workload: Workload) -> None:
    """Raise ValueError for what would otherwise be read from the wrong place, or break monotonicity."""
    if len(workload.full_widths) != workload.families:
        raise ValueError(f"{len(workload.full_widths)} full widths for {workload.families} families")
    sizes = [size for size, _ in workload.parameters] + list(workload.buffers)
    for operator in workload.operators:
        if operator.kind not in get_args(Kind):
            raise ValueError(f"operator '{operator.name}' has the unknown kind '{operator.kind}'")
        sizes += [*operator.macs, *operator.reads, *operator.writes, *operator.weights]
    for axis in {axis for size in sizes for axis in size.axes}:
        if axis.constant < 0 or any(multiplicity < 0 for _, multiplicity in axis.terms):
            raise ValueError(f"{axis} shrinks as widths grow")
        if any(not 0 <= family < workload.families for family, _ in axis.terms):
            raise ValueError(f"{axis} names a family beyond {workload.families}")
    if any(not 0 <= index < len(workload.buffers) for step in workload.live for index in step):
        raise ValueError("a step of execution names a buffer that is not there")
