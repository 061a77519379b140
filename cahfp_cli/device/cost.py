"""What a network costs on a device, as a function of how many channel groups each family keeps.

Latency is the sum over operators of what their kernels take (see latency.py) and an overhead of the call. Without a
calibration every kernel runs at the profile's peaks. Then every cost grows with every width. With one, a width that a
kernel's blocks do not fit can cost more than a wider one, see `CostModel.settled`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cahfp_cli.device.arena import Arena, Layout
from cahfp_cli.device.latency import Kernels, rates_of
from cahfp_cli.device.operators import Workload, check
from cahfp_cli.device.profile import DeviceProfile
from cahfp_cli.device.sizes import ITEM_BYTES, Array, Sums

CONTAINER_BYTES = 8 * 1024
CONTAINER_BYTES_PER_OPERATOR = 256
"""An ONNX file beside its weights: exported chains of conv, norm and relu took 230 bytes for each operator traced."""

ONE_IN_TWENTY = 1.645
"""Standard deviations above which one of twenty normal values lies."""


@dataclass(frozen=True)
class Cost:
    """Costs of one or many candidates; each array has the shape of the widths without their last axis.

    memory_bytes: all stored tensors plus activation_bytes, the peak of the activations: what ONNX Runtime holds where
    the profile says that it computes on the CPU (device/arena.py), else what is live at once, without workspace; both
    NaN where they were not asked for. storage_bytes: all stored tensors plus the container around them; macs as
    computed, without alignment; params: elements of all stored tensors. latency_seconds is what is expected, and
    slow_seconds, which latency budgets hold for, what 95 of 100 networks should not exceed, by the standard deviation
    of the profile's calibration; both None without a device.
    """

    latency_seconds: Array | None
    slow_seconds: Array | None
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
        """All three together."""
        return self.compute + self.memory + self.overhead


class CostModel:
    """A workload compiled for one device (or for none: then there is no latency).

    alignment: channels that are computed together; a width inside such a step costs as much as one at its end.
    hard: channels that fast kernels want a multiple of; a width that is none may take longer than a wider one.
    full_widths: int64 (families,), and full: their cost.
    """

    def __init__(self, workload: Workload, profile: DeviceProfile | None) -> None:
        check(workload)
        operators = workload.operators
        live = [tuple(workload.buffers[index] for index in step) for step in workload.live] or [()]
        self.workload = workload
        self._container = CONTAINER_BYTES + CONTAINER_BYTES_PER_OPERATOR * len(operators)
        totals = [
            [(operator.product.macs, 1) for operator in operators if operator.product is not None],
            [(size, 1) for size, _ in workload.parameters],
            list(workload.parameters),
        ]
        peaks = [[(size, ITEM_BYTES) for size in step] for step in live]
        self._sums = Sums([*totals, *peaks], workload.families)
        alignment = None if profile is None else profile.alignment
        calibration = None if profile is None else profile.calibration
        self.alignment = 1 if alignment is None else int(alignment.step.value)
        # What paper says about a device knows of no slow kernels, so none are assumed.
        self.hard = int(alignment.hard.value) if alignment is not None and calibration is not None else 1
        self._spread = 0.0 if calibration is None or calibration.spread is None else calibration.spread.si
        self._timed = None
        if profile is not None:
            self._timed = Kernels(operators, workload.families, self.alignment, self.hard), rates_of(profile)
        self._arena = arena_of(workload, profile)
        self.full_widths = np.array(workload.full_widths, np.int64)
        self.full = self.cost(self.full_widths)

    def settled(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The least widths that are not below these and that fast kernels take, or full; int64 like `widths`.

        Costs of settled widths grow with every width, which selection relies on.
        """
        return np.minimum(-(-widths // self.hard) * self.hard, self.full_widths)

    def cost(self, widths: NDArray[Any], memory: bool = True) -> Cost:
        """All costs of `widths`, shape (families,) or (batch, families): groups kept, not negative.

        Args: memory: without it, all but memory, of which the arena takes a hundred times as long as the rest.
        Raises ValueError for another shape.
        """
        batch, shape = self._batch(widths)
        totals, peaks = np.split(self._sums(batch), [3], axis=1)
        macs, params, stored = totals.T
        if not memory:
            activations = np.full(len(batch), np.nan)
        else:
            activations = peaks.max(axis=1) if self._arena is None else self._arena(batch)
        latency = None
        if self._timed is not None:
            kernels, rates = self._timed
            parts = rates.seconds(kernels.quantities(batch))
            latency = (sum(part.sum(axis=1) for part in parts) + rates.call).reshape(shape)
        return Cost(
            latency_seconds=latency,
            slow_seconds=None if latency is None else latency * (1 + ONE_IN_TWENTY * self._spread),
            memory_bytes=(stored + activations).reshape(shape),
            activation_bytes=activations.reshape(shape),
            storage_bytes=(stored + self._container).reshape(shape),
            macs=macs.reshape(shape),
            params=params.reshape(shape),
        )

    def breakdown(self, widths: NDArray[Any]) -> Breakdown:
        """Latency by operator of `widths`, shape (families,) or (batch, families).

        Raises ValueError for another shape, or if the model was compiled without a profile.
        """
        if self._timed is None:
            raise ValueError("a cost model without a profile has no latency")
        kernels, rates = self._timed
        batch, shape = self._batch(widths)
        times = np.zeros((3, len(batch), len(self.workload.operators)))
        times[:, :, kernels.timed] = rates.seconds(kernels.quantities(batch))
        compute, memory, overhead = times.reshape(3, *shape, -1)
        names = tuple(operator.name for operator in self.workload.operators)
        return Breakdown(names, compute, memory, overhead, rates.call)

    def _batch(self, widths: NDArray[Any]) -> tuple[Array, tuple[int, ...]]:
        if widths.ndim not in (1, 2) or widths.shape[-1] != self.workload.families:
            raise ValueError(f"widths of shape {widths.shape} for a workload of {self.workload.families} families")
        return np.atleast_2d(np.asarray(widths, np.float64)), widths.shape[:-1]


def compile_workload(workload: Workload, profile: DeviceProfile | None) -> CostModel:
    """Prepare `workload` for many evaluations on one device.

    Raises ValueError if the workload names a family, a buffer or a kind that it does not have.
    """
    return CostModel(workload, profile)


def arena_of(workload: Workload, profile: DeviceProfile | None) -> Arena | None:
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
