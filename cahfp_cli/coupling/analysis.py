"""From a model to its channel groups: trace in both modes, solve, and prove the result on a sliced copy.

Where the proof finds a width in the model's code that slicing cannot change and no rewrite can, everything at that
place is pinned and the groups are solved again.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling import rules
from cahfp_cli.coupling.atoms import Atoms, Labels, varies
from cahfp_cli.coupling.groups import ChannelGroups, solve
from cahfp_cli.coupling.registry import Axes, Consumption, Couplings
from cahfp_cli.coupling.rewriting import install
from cahfp_cli.coupling.rewrites import Rewrite
from cahfp_cli.coupling.slicing import slice_module, to_meta
from cahfp_cli.coupling.trace import Trace, labels_of_parameters, run
from cahfp_cli.coupling.verification import MODES, Mismatch, Mode, Plan, Verified, sample_for, verify
from cahfp_cli.errors import InputError, VerificationError, first_line

assert rules.__all__  # importing the package fills the registry

M = TypeVar("M", bound=nn.Module)

MAX_REPAIRS = 200
RANDOM_PROBES = 2


@dataclass(frozen=True)
class Analysis:
    """What is known of a network's structure.

    groups: its channel groups.
    traces: the runs in evaluation mode at batch 1 and in training mode at batch 2 (`MODES`).
    group_of_atom: int64 (atoms,), to read the traces' labels as groups.
    input_shape, dtype: of the sample it was traced with.
    rewritten: places in the model's code that fix a width and are rewritten in a slice, as "module: function".
    on_meta: whether the model runs on meta tensors; else it was traced on real ones.
    """

    groups: ChannelGroups
    traces: tuple[Trace, ...]
    group_of_atom: Labels
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    rewritten: tuple[str, ...]
    on_meta: bool


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
    try:
        return analyse_on(to_meta(model), input_shape, dtype, on_meta=True)
    except InputError:
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            raise
    return analyse_on(copy.deepcopy(model), input_shape, dtype, on_meta=False)  # it reads values, or has no meta kernels


def analyse_on(subject: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype, on_meta: bool) -> Analysis:
    """As `analyse`, on a copy of the model that may be run; with meta tensors or real ones."""
    choices: dict[tuple[int, ...], int] = {}
    while (analysis := attempt(subject, input_shape, dtype, choices, on_meta)) is None:
        pass
    return analysis


def attempt(
    subject: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    choices: dict[tuple[int, ...], int],
    on_meta: bool,
) -> Analysis | None:
    """Trace, solve, and pin what slicing shows to be fixed; None if a split chose the wrong axis: then trace again."""
    couplings = Couplings(Atoms(), split_choice=choices)
    labels = labels_of_parameters(subject, couplings)
    evaluation = trace(subject, input_shape, dtype, MODES[0], couplings, labels, on_meta)
    consumptions = tuple(couplings.consumptions)  # those of training alone (auxiliary heads) do not count for the loss
    traces = (evaluation, trace(subject, input_shape, dtype, MODES[1], couplings, labels, on_meta))
    if revise_choices(couplings):
        return None
    prunable = {name: axes for name, axes in labels.items() if name in subject.state_dict()}
    rng = np.random.default_rng(0)
    groups, group_of_atom = solve(couplings.atoms, prunable, consumptions)
    for _ in range(MAX_REPAIRS):
        plans = [Plan(one, group_of_atom) for one in traces]
        rewrites: list[Rewrite] = []

        def mismatch_of(kept: NDArray[np.bool_]) -> Mismatch | None:
            verified = verify(subject, groups.indices(kept), plans, kept, input_shape, dtype, on_meta)
            rewrites.extend(verified.rewrites)
            return verified.mismatch

        for narrowest in floors(groups):
            mismatch = mismatch_of(probe(groups, narrowest, 0.0, rng))
            if mismatch is None:
                break
        for _ in range(RANDOM_PROBES):
            mismatch = mismatch or mismatch_of(probe(groups, narrowest, 1.0, rng))
        if mismatch is None:
            sites = tuple(dict.fromkeys(f"{rewrite.module}: {rewrite.function}" for rewrite in rewrites))
            groups = replace(groups, narrowest=narrowest)
            return Analysis(groups, traces, group_of_atom, input_shape, dtype, sites, on_meta)
        if revise_choice_at(couplings, traces, mismatch):
            return None
        groups, group_of_atom = pin_mismatch(couplings, traces, mismatch, groups, prunable, consumptions)
    raise InputError(f"the model's widths are fixed in more than {MAX_REPAIRS} places of its code")


def check_slice(model: nn.Module, analysis: Analysis, kept: NDArray[np.bool_]) -> tuple[Rewrite, ...]:
    """Prove one slice, in both modes; returns the rewrites that it needs.

    Raises: VerificationError: an operator of the sliced model does not do what was planned.
    """
    subject = to_meta(model) if analysis.on_meta else copy.deepcopy(model)
    plans = [Plan(one, analysis.group_of_atom) for one in analysis.traces]
    indices = analysis.groups.indices(kept)

    def verified(rewrites: tuple[Rewrite, ...] | None) -> Verified:
        found = verify(
            subject, indices, plans, kept, analysis.input_shape, analysis.dtype, analysis.on_meta, rewrites
        )
        if found.mismatch is not None:
            operator = analysis.traces[found.mismatch.trace].operations[found.mismatch.position].name
            raise VerificationError(
                f"the sliced model differs from its plan at operator {operator}: {found.mismatch.problem}"
            )
        return found

    rewrites = verified(None).rewrites
    if rewrites:
        verified(rewrites)
    return rewrites


def cut(model: M, analysis: Analysis, kept: NDArray[np.bool_]) -> tuple[M, tuple[Rewrite, ...]]:
    """The compact network of the kept groups in evaluation mode, proved in both modes, and the rewrites in place in it.

    Raises: VerificationError: as `check_slice`.
    """
    rewrites = check_slice(model, analysis, kept)
    return install(slice_module(model, analysis.groups.indices(kept)), rewrites).eval(), rewrites


def trace(
    subject: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    mode: Mode,
    couplings: Couplings,
    labels: Mapping[str, Axes],
    on_meta: bool,
) -> Trace:
    """One run on a fresh copy (models may change their own state on the first forward)."""
    sample = sample_for(mode, input_shape, dtype, on_meta)
    fresh = to_meta(subject) if on_meta else copy.deepcopy(subject)
    try:
        return run(fresh, (sample,), training=mode.training, couplings=couplings, labels=labels)
    except Exception as error:  # whatever the user's own forward raises
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


def revise_choice_at(couplings: Couplings, traces: Sequence[Trace], mismatch: Mismatch) -> bool:
    """Move on to the next axis of the split at a mismatch, if it is one; the code fixes the length of the chosen
    axis."""
    values = traces[mismatch.trace].values
    operation = traces[mismatch.trace].operations[mismatch.position]
    written = [labels for value in operation.outputs for labels in values[value].axes]
    for shape, _, along in couplings.splits:
        if any(labels is along for labels in written) and couplings.split_choice[shape] + 1 < len(shape):
            couplings.split_choice[shape] += 1
            return True
    return False


def floors(groups: ChannelGroups) -> list[Labels]:
    """Narrowest widths to try, int64 (families,) each: one group; two, since an axis of length 1 means something else
    to broadcasting; an eighth, since code like `channels // heads` comes to zero below."""
    full = groups.widths(np.ones(groups.count, dtype=bool))
    return [np.minimum(full, floor) for floor in (1, 2, np.maximum(2, -(-full // 8)))]


def probe(groups: ChannelGroups, narrowest: Labels, spread: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A random mask that keeps at least the narrowest widths, and up to the share `spread` of what is above them.

    Each family keeps another share, so that widths which were equal by chance are not.
    """
    full = groups.widths(np.ones(groups.count, dtype=bool))
    widths = narrowest + ((full - narrowest + 1) * spread * rng.random(len(full))).astype(np.int64)
    order = np.lexsort((rng.random(groups.count), groups.family))  # each family in random order, one after the other
    place = np.arange(groups.count) - np.repeat(np.cumsum(full) - full, full)
    kept = np.zeros(groups.count, dtype=bool)
    kept[order[place < np.repeat(widths, full)]] = True
    return kept


def pin_mismatch(
    couplings: Couplings,
    traces: Sequence[Trace],
    mismatch: Mismatch,
    groups: ChannelGroups,
    prunable: Mapping[str, Axes],
    consumptions: Sequence[Consumption],
) -> tuple[ChannelGroups, Labels]:
    """Fail closed: nothing that the operator reads or writes is pruned, there and wherever the same code runs.

    If all of that was pinned already, what went wrong began earlier: the operators before it are pinned one by one.
    Raises: InputError: nothing is left to pin.
    """
    expected = traces[mismatch.trace]
    operations = expected.operations
    for position in range(mismatch.position, -1, -1):
        culprit = operations[position]
        stopped = mismatch.raised and position == mismatch.position  # the code did not like what it was about to read
        for operation in operations:
            if (operation.site, operation.name) == (culprit.site, culprit.name):
                read = [v for v in operation.inputs if not stopped or expected.values[v].parameter is None]
                for value in read if stopped else (*read, *operation.outputs):
                    for labels in expected.values[value].axes:
                        couplings.atoms.pin(labels, f"the model's code fixes a width at operator {operation.name}")
        pinned, group_of_atom = solve(couplings.atoms, prunable, consumptions)
        if pinned.count < groups.count:
            return pinned, group_of_atom
    raise InputError(f"the model does not run twice in the same way: {mismatch.problem}")
