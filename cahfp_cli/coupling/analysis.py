"""From a model to its channel groups: trace in both modes, solve, and prove the result on a sliced copy.

Where the proof finds a width in the model's code that slicing cannot change and no rewrite can, everything at that
place is pinned and the groups are solved again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.coupling import rules
from cahfp_cli.coupling.atoms import Atoms, Labels, varies
from cahfp_cli.coupling.calls import CallRecord
from cahfp_cli.coupling.comparison import Behaviour, device_of, drawn_samples, examine
from cahfp_cli.coupling.copying import tensors_of
from cahfp_cli.coupling.groups import ChannelGroups, solve
from cahfp_cli.coupling.meta_run import Mode, Subject
from cahfp_cli.coupling.reach import pin_unreached
from cahfp_cli.coupling.registry import Axes, Couplings
from cahfp_cli.coupling.rewriting import install
from cahfp_cli.coupling.slicing import clone, slice_module, to_meta
from cahfp_cli.coupling.trace import Trace, TracerError, labels_of_parameters, run
from cahfp_cli.coupling.verification import Mismatch, Plan, verify
from cahfp_cli.errors import InputError, VerificationError, first_line
from cahfp_cli.formats.rewrites import Number, Rewrite

assert rules.__all__  # importing the package fills the registry

M = TypeVar("M", bound=nn.Module)

MAX_REPAIRS = 200
RANDOM_PROBES = 1


@dataclass(frozen=True)
class Analysis:
    """What is known of a network's structure.

    groups: its channel groups.
    traces: the runs in evaluation mode at batch 1 and in training mode at batch 2 (see `Subject.modes`).
    group_of_atom: int64 (atoms,), to read the traces' labels as groups.
    input_shape, dtype: of the sample it was traced with.
    rewritten: places in the model's code that fix a width and are rewritten in a slice, as "module: function".
    on_meta: whether the model runs on meta tensors; else it was traced on real ones.
    default_dtype: what torch makes tensors in where the model's code names none.
    steered: whether random numbers may decide what runs while it trains.
    given: the samples that it was traced with, (n, *input_shape), where constants would not do.
    behaviour: what running it showed.
    """

    groups: ChannelGroups
    traces: tuple[Trace, ...]
    group_of_atom: Labels
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    rewritten: tuple[str, ...]
    on_meta: bool
    default_dtype: torch.dtype
    steered: bool
    given: torch.Tensor | None = None
    behaviour: Behaviour = field(default_factory=Behaviour)

    def subject(self, model: nn.Module) -> Subject:
        """A network of this structure, to be run as the analysed one was."""
        own = to_meta(model) if self.on_meta else clone(model)
        return Subject(own, self.input_shape, self.dtype, self.on_meta, self.default_dtype, self.steered, self.given)


def analyse(
    model: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    samples: torch.Tensor | None = None,
) -> Analysis:
    """Find the channel groups of a network.

    Args:
        model: any module; not changed. Its tensors may be on any device.
        input_shape: of one sample, without the batch.
        dtype: of the input; integer for token models.
        samples: (n, *input_shape) of that dtype, at least two, to run it on; random ones are drawn without. The
            structure is found on shapes or constants, to be the same with any samples or none, unless it refuses these.
    Returns:
        Groups whose removal was tried on a sliced copy, in evaluation and in training mode.
    Raises:
        InputError: the model does not run on such an input, or cannot be copied.
        VerificationError: a copy of it computes something else.
    """
    analysis = find_groups(model, input_shape, dtype, samples)
    if any(tensor.is_meta for tensor in tensors_of(model).values()):
        return analysis  # there are no numbers to compare
    device = device_of(model)
    given = drawn_samples(input_shape, dtype, device) if samples is None else samples.to(device)
    return replace(analysis, behaviour=examine(model, given, analysis.default_dtype))


def find_groups(
    model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype, samples: torch.Tensor | None = None
) -> Analysis:
    """As `analyse`, by shapes alone: nothing is computed unless the network reads values."""
    default_dtype = torch.get_default_dtype()
    try:
        return analyse_subject(Subject(to_meta(model), input_shape, dtype, True, default_dtype))
    except InputError:
        if any(tensor.is_meta for tensor in tensors_of(model).values()):
            raise
    # The code reads values, or an operator has no shape function: then it runs on the real tensors.
    subject = Subject(clone(model), input_shape, dtype, False, default_dtype)
    try:
        return analyse_subject(subject)
    except InputError:
        if samples is None:
            raise
    # It refuses constants, as a network for text may that looks for the end of each sentence.
    return analyse_subject(replace(subject, given=samples.to(device_of(model))))


def analyse_subject(subject: Subject) -> Analysis:
    """As `analyse`."""
    choices: dict[tuple[int, ...], int] = {}
    while (analysis := attempt(subject, choices)) is None:
        pass
    return analysis


def attempt(subject: Subject, choices: dict[tuple[int, ...], int]) -> Analysis | None:
    """Trace, solve, and pin what slicing shows to be fixed; None if a split chose the wrong axis: then trace again."""
    couplings = Couplings(Atoms(), split_choice=choices)
    labels = labels_of_parameters(subject.model, couplings)
    evaluation = trace(subject, subject.modes[0], couplings, labels)
    consumptions = tuple(couplings.consumptions)  # those of training alone (auxiliary heads) do not count for the loss
    training = trace(subject, subject.modes[1], couplings, labels)
    subject = replace(subject, steered=training.steered)
    traces = (evaluation, training, *(trace(subject, mode, couplings, labels) for mode in subject.modes[2:]))
    pin_unreached(couplings, labels, traces)
    if revise_choices(couplings):
        return None
    saved = subject.model.state_dict().keys()
    tensors = {name: axes for name, axes in labels.items() if name in saved}
    buffers = {name: axes for name, axes in labels.items() if name not in saved}
    rng = np.random.default_rng(0)
    groups, group_of_atom = solve(couplings.atoms, tensors, buffers, consumptions)
    for _ in range(MAX_REPAIRS):
        proof = prove(subject, [Plan(one, group_of_atom) for one in traces], groups, rng)
        if proof.mismatch is None:
            groups = replace(groups, narrowest=proof.narrowest)
            sites = dict.fromkeys(f"{rewrite.module}: {rewrite.function}" for rewrite in proof.rewrites)
            return Analysis(
                groups,
                traces,
                group_of_atom,
                subject.input_shape,
                subject.dtype,
                tuple(sites),
                subject.on_meta,
                subject.default_dtype,
                subject.steered,
                subject.given,
            )
        if revise_choice_at(couplings, traces, proof.mismatch):
            return None
        before = groups.count
        if proof.mismatch.alike is not None:
            tie_alike(couplings, traces, proof.mismatch.alike)
            groups, group_of_atom = solve(couplings.atoms, tensors, buffers, consumptions)
            if groups.count < before:
                continue
        for _ in pins(couplings, traces, proof.mismatch):
            groups, group_of_atom = solve(couplings.atoms, tensors, buffers, consumptions)
            if groups.count < before:
                break
        else:
            raise InputError(f"the model does not run twice in the same way: {proof.mismatch.problem}")
    raise InputError(f"the model's widths are fixed in more than {MAX_REPAIRS} places of its code")


@dataclass(frozen=True)
class Proof:
    """What slices of some widths showed: the first mismatch if there was one; else the narrowest widths that ran, and
    the rewrites that were needed."""

    mismatch: Mismatch | None
    narrowest: Labels
    rewrites: tuple[Rewrite, ...]


def prove(subject: Subject, plans: Sequence[Plan], groups: ChannelGroups, rng: np.random.Generator) -> Proof:
    """Slice at the narrowest widths that run as traced, and at random ones."""
    for narrowest in floors(groups):
        first = verify(subject, plans, groups, probe(groups, narrowest, 0.0, rng))
        if first.mismatch is None:
            break
    rewrites = first.rewrites
    for _ in range(RANDOM_PROBES if first.mismatch is None else 0):
        found = verify(subject, plans, groups, probe(groups, narrowest, 1.0, rng))
        rewrites += found.rewrites
        if found.mismatch is not None:
            return Proof(found.mismatch, narrowest, ())
    return Proof(first.mismatch, narrowest, rewrites)


def check_slice(model: nn.Module, analysis: Analysis, kept: NDArray[np.bool_]) -> tuple[Rewrite, ...]:
    """Prove one slice, in both modes; returns the rewrites that it needs.

    Raises: VerificationError: an operator of the sliced model does not do what was planned.
    """
    plans = [Plan(one, analysis.group_of_atom) for one in analysis.traces]
    found = verify(analysis.subject(model), plans, analysis.groups, kept)
    if found.mismatch is not None:
        operator = analysis.traces[found.mismatch.trace].operations[found.mismatch.position].name
        raise VerificationError(
            f"the sliced model differs from its plan at operator {operator}: {found.mismatch.problem}"
        )
    return found.rewrites


def cut(model: M, analysis: Analysis, kept: NDArray[np.bool_]) -> tuple[M, tuple[Rewrite, ...]]:
    """The compact network of the kept groups in evaluation mode, proved in both modes, and the rewrites in place in it.

    Raises: VerificationError: as `check_slice`.
    """
    rewrites = check_slice(model, analysis, kept)
    return install(slice_module(model, analysis.groups.indices(kept)), rewrites).eval(), rewrites


def trace(subject: Subject, mode: Mode, couplings: Couplings, labels: Mapping[str, Axes]) -> Trace:
    """One run on a fresh copy. Raises: InputError: the model does not run."""
    try:
        return run(subject, mode, couplings=couplings, labels=labels)
    except TracerError:
        raise
    except Exception as error:  # whatever the user's own forward raises
        shape, dtype = "x".join(map(str, subject.input_shape)), str(subject.dtype).removeprefix("torch.")
        raise InputError(
            f"the model does not run on an input of shape {shape} and type {dtype}: {first_line(error)}\n"
            "Check --input-shape, --input-dtype and --model-arg; if it reads values, try real samples (--data)."
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


def tie_alike(couplings: Couplings, traces: Sequence[Trace], record: CallRecord) -> None:
    """Make whatever the same code says the same number of as wide in one call as in the others: a rewrite goes by the
    place in the code, so that a loop over heads has one width for all of them."""
    for trace in traces:
        first: dict[tuple[str | None, tuple[Number, ...]], CallRecord] = {}
        for one in trace.calls:
            if (one.call.function, one.call.place) != (record.call.function, record.call.place):
                continue
            known = first.setdefault((one.module, one.numbers), one)
            for left, right in zip(known.results, one.results, strict=False):
                for a, b in zip(trace.values[left].axes, trace.values[right].axes, strict=False):
                    if a is not b and len(a) == len(b) and varies(a) and varies(b):
                        couplings.atoms.tie(a, b)


def pins(couplings: Couplings, traces: Sequence[Trace], mismatch: Mismatch) -> Iterator[None]:
    """Fail closed: pin what the operator reads and writes, there and wherever the same code runs; then, step by step
    as long as the caller asks, what the operators before it do."""
    expected = traces[mismatch.trace]
    for position in range(mismatch.position, -1, -1):
        culprit = expected.operations[position]
        stopped = mismatch.raised and position == mismatch.position  # the code did not like what it was about to read
        for operation in expected.operations:
            if (operation.site, operation.name) != (culprit.site, culprit.name):
                continue
            read = [v for v in operation.inputs if not stopped or expected.values[v].parameter is None]
            for value in read if stopped else (*read, *operation.outputs):
                for labels in expected.values[value].axes:
                    couplings.atoms.pin(labels, f"the model's code fixes a width at operator {operation.name}")
        yield
