"""From a model to its channel groups: trace in both modes, solve, and prove the result on a sliced copy.

The proof is the op-log check: sliced copies run on meta tensors, and operator k must give exactly the shapes that the
atoms predict, and compute with the same numbers (a scale that follows a width would change what is kept). Where it
does not, the model's code holds a width that slicing cannot change: that site is pinned, the groups are solved again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling import rules
from cahfp_cli.coupling.atoms import Atoms, Labels, varies
from cahfp_cli.coupling.groups import ChannelGroups, solve
from cahfp_cli.coupling.registry import Axes, Couplings
from cahfp_cli.coupling.slicing import slice_module, to_meta
from cahfp_cli.coupling.trace import Operation, OperatorLog, Trace, forward, labels_of_parameters, run
from cahfp_cli.errors import InputError, VerificationError, first_line

assert rules.__all__  # importing the package fills the registry

MAX_REPAIRS = 200
PROBES = 3

LAYOUT: dict[str, str | None] = {
    "clone": None,
    "contiguous": None,
    "detach": None,
    "alias": None,
    "_unsafe_view": "view",
    "_reshape_alias": "view",
    "_reshape_copy": "view",
    "view_copy": "view",
}
"""Operators that come and go with the memory layout of a width and mean the same: left out (None) or renamed."""


@dataclass(frozen=True)
class Analysis:
    """What is known of a network's structure.

    groups: its channel groups.
    traces: the runs in evaluation mode at batch 1 and in training mode at batch 2 (`MODES`).
    group_of_atom: int64 (atoms,), to read the traces' labels as groups.
    input_shape, dtype: of the sample it was traced with.
    """

    groups: ChannelGroups
    traces: tuple[Trace, ...]
    group_of_atom: Labels
    input_shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Mode:
    """One way to run the model: training or evaluation, with a batch."""

    training: bool
    batch: int


MODES = (Mode(training=False, batch=1), Mode(training=True, batch=2))


@dataclass(frozen=True)
class Site:
    """Where a sliced model departed from the prediction: an operator of trace number `trace`."""

    trace: int
    operation: Operation
    problem: str


def analyse(model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Analysis:
    """Find the channel groups of a network.

    Args:
        model: any module; not changed. Its tensors may be on any device.
        input_shape: of one sample, without the batch.
        dtype: of the input; integer for token models.
    Returns:
        Groups whose removal was tried on a sliced copy, in evaluation and in training mode.
    Raises:
        InputError: the model does not run on such an input.
    """
    meta = to_meta(model)
    choices: dict[tuple[int, ...], int] = {}
    while (analysis := attempt(meta, input_shape, dtype, choices)) is None:
        pass
    return analysis


def attempt(
    meta: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype, choices: dict[tuple[int, ...], int]
) -> Analysis | None:
    """Trace, solve, and pin what slicing shows to be fixed; None if a split chose the wrong axis: then trace again."""
    couplings = Couplings(Atoms(), split_choice=choices)
    labels = labels_of_parameters(meta, couplings)
    evaluation = trace(meta, input_shape, dtype, MODES[0], couplings, labels)
    consumers = tuple(couplings.consumers)  # those of training alone (auxiliary heads) do not count for the loss
    traces = (evaluation, trace(meta, input_shape, dtype, MODES[1], couplings, labels))
    if revise_choices(couplings):
        return None
    prunable = {name: axes for name, axes in labels.items() if name in meta.state_dict()}
    rng = np.random.default_rng(0)
    for _ in range(MAX_REPAIRS):
        groups, group_of_atom = solve(couplings.atoms, prunable, consumers)
        analysis = Analysis(groups, traces, group_of_atom, input_shape, dtype)
        sites = (first_mismatch(meta, analysis, kept) for kept in probes(groups, rng))
        site = next((site for site in sites if site is not None), None)
        if site is None:
            return analysis
        if revise_choice_at(couplings, traces, site):
            return None
        pin_site(couplings, traces, site)
        if solve(couplings.atoms, prunable, consumers)[0].count == groups.count:
            raise InputError(f"the model's widths cannot be followed at operator {site.operation.name}: {site.problem}")
    raise InputError(f"the model's widths are fixed in more than {MAX_REPAIRS} places of its code")


def check_slice(model: nn.Module, analysis: Analysis, kept: NDArray[np.bool_]) -> None:
    """Raise VerificationError unless every operator of the sliced model has its predicted shapes, in both modes."""
    site = first_mismatch(to_meta(model), analysis, kept)
    if site is not None:
        raise VerificationError(
            f"the sliced model differs from its plan at operator {site.operation.name}: {site.problem}"
        )


def trace(
    meta: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    mode: Mode,
    couplings: Couplings,
    labels: Mapping[str, Axes],
) -> Trace:
    """One run on a fresh copy (models may change their own state on the first forward)."""
    sample = torch.empty((mode.batch, *input_shape), device="meta", dtype=dtype)
    copy = to_meta(meta)
    try:
        return run(copy, (sample,), training=mode.training, couplings=couplings, labels=labels)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        shape = "x".join(map(str, input_shape))
        raise InputError(
            f"the model does not run on an input of shape {shape}: {first_line(error)}\n"
            "Check --input-shape and --model-arg."
        ) from error


def revise_choices(couplings: Couplings) -> bool:
    """Move on to the next axis where a split's chosen axis turned out pinned; whether anything changed."""
    component = couplings.atoms.solve()
    revised: set[tuple[int, ...]] = set()
    for shape, _, along in couplings.splits:
        if shape in revised or not varies(along) or (component[along] != component[0]).any():
            continue
        if couplings.split_choice[shape] + 1 < len(shape):
            couplings.split_choice[shape] += 1
            revised.add(shape)
    return bool(revised)


def revise_choice_at(couplings: Couplings, traces: tuple[Trace, ...], site: Site) -> bool:
    """Move on to the next axis of the split at a site, if it is one; the code fixes the length of the chosen axis."""
    values = traces[site.trace].values
    written = [labels for value in site.operation.outputs for labels in values[value].axes]
    for shape, _, along in couplings.splits:
        if any(labels is along for labels in written) and couplings.split_choice[shape] + 1 < len(shape):
            couplings.split_choice[shape] += 1
            return True
    return False


def probes(groups: ChannelGroups, rng: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
    """Masks that keep at least one group of each family: one that keeps no more, and random ones.

    Each family keeps another share of its groups, so that widths which were equal by chance are not.
    """
    for number in range(PROBES):
        share = rng.random(len(groups.names)) if number else np.zeros(len(groups.names))
        kept = rng.random(groups.count) < share[groups.family]
        for family in np.flatnonzero(groups.widths(kept) == 0):
            kept[rng.choice(np.flatnonzero(groups.family == family))] = True
        yield kept


def first_mismatch(meta: nn.Module, analysis: Analysis, kept: NDArray[np.bool_]) -> Site | None:
    """Slice, run on meta, compare operator by operator with the traces' predictions; None if all agree."""
    compact = slice_module(meta, analysis.groups.indices(kept))
    alive = np.append(kept, True)
    for number, (expected, mode) in enumerate(zip(analysis.traces, MODES, strict=True)):
        sample = torch.empty((mode.batch, *analysis.input_shape), device="meta", dtype=analysis.dtype)
        log = OperatorLog()
        problem = None
        try:
            forward(to_meta(compact), (sample,), mode.training, log)
        except Exception as error:  # whatever the user's own forward raises on a width it does not expect
            problem = first_line(error)
        ran = [entry for entry in log.entries if LAYOUT.get(entry.name, entry.name)]
        planned = [operation for operation in expected.operations if LAYOUT.get(operation.name, operation.name)]
        for position, operation in enumerate(planned):
            predicted = tuple(
                tuple(int(alive[analysis.group_of_atom[labels]].sum()) for labels in expected.values[value].axes)
                for value in operation.outputs
            )
            if position >= len(ran):
                return Site(number, operation, problem or "the sliced model ran fewer operators")
            entry = ran[position]
            if LAYOUT.get(entry.name, entry.name) != LAYOUT.get(operation.name, operation.name):
                return Site(number, operation, f"the sliced model ran {entry.name} instead")
            if entry.shapes != predicted:
                return Site(number, operation, f"shape {entry.shapes} instead of {predicted}")
            if entry.numbers != operation.numbers:
                return Site(number, operation, f"numbers {entry.numbers} instead of {operation.numbers}")
        if problem is not None or len(ran) != len(planned):
            return Site(number, planned[-1], problem or "the sliced model ran more operators")
    return None


def pin_site(couplings: Couplings, traces: tuple[Trace, ...], site: Site) -> None:
    """Fail closed: nothing that the operator reads or writes is pruned."""
    expected = traces[site.trace]
    for value in (*site.operation.inputs, *site.operation.outputs):
        for labels in expected.values[value].axes:
            couplings.atoms.pin(labels, f"the model's code fixes a width at operator {site.operation.name}")
