"""Networks side by side on the same samples: what a copy or a submodel must compute, and how a network behaves.

A slice is proved operator by operator on shapes; this is the second net, on numbers. A copy that shares what it should
not, or the other way round, passes every check of shapes and gives other results.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from cahfp_cli.coupling.conditions import conditions
from cahfp_cli.coupling.copying import tensors_of
from cahfp_cli.coupling.slicing import slice_module
from cahfp_cli.errors import InputError, VerificationError, first_line
from cahfp_cli.models.outputs import all_tensors_of
from cahfp_cli.models.undisturbed import undisturbed

SAMPLES = 2
"""Looked at at once: the fewest that can influence one another."""
CLOSE, FAR, CLOSE_IN_DOUBLE = 1e-4, 1e-2, 1e-8
"""Differences relative to the largest output: below the first rounding explains all, above the second nothing; in
between, and wherever the network runs in double precision, that decides, by the third."""
Outputs = list[torch.Tensor]


@dataclass(frozen=True)
class Behaviour:
    """What of a network's behaviour users should know, a sentence for each thing that measures of single samples, or
    of two runs, do not expect; `repeatable` if the same samples and seed give the same results, `draws` if results
    depend on the seed."""

    remarks: tuple[str, ...] = ()
    repeatable: bool = True
    draws: bool = False


def examine(model: nn.Module, samples: torch.Tensor, dtype: torch.dtype) -> Behaviour:
    """Cut nothing away and compare with the network itself; say what of its behaviour users should know.

    Args:
        model: left as it was, though it runs. samples: at least `SAMPLES`, on its device.
        dtype: torch's default dtype for the runs.
    Raises: VerificationError: a copy computes something else; InputError: the network does not run.
    """
    several = samples[:SAMPLES]
    given = several.clone()
    first, again = run(model, dtype, given, several.clone())
    found = [] if given.equal(several) else ["the network changes its own input"]
    stateless = repeatable = True
    if distance(first, again) > 0:
        repeatable = distance(first, run(model, dtype, several.clone())[0]) == 0  # when put back as it was
        stateless = False
        found.append("the network changes when it runs: the same samples then give other results")
    draws = repeatable and distance(first, run(model, dtype, several.clone(), seed=1)[0]) > 0
    if draws:
        found.append("the network draws random numbers in evaluation mode: results depend on the seed")
    elif stateless and depends_on_batch(first, run(model, dtype, several[:1].clone())[0]):
        found.append("the samples of a batch influence one another: results depend on what else is in the batch")
    if repeatable:
        difference = largest_difference(model, slice_module(model, {}).eval(), samples, dtype)
        if difference is not None:
            raise VerificationError(
                f"a copy of the network computes something else than the network ({difference}), so no submodel would "
                "be right.\nIt uses something outside itself, such as a global variable: keep that in the module."
            )
    return Behaviour(tuple(found), repeatable, draws)


def depends_on_batch(together: Outputs, alone: Outputs) -> bool:
    """Whether the first sample's outputs are others alone than among several; outputs without a row for each sample
    cannot tell."""
    rows = [
        (one[:1], other)
        for one, other in zip(together, alone, strict=False)
        if one.dim() and len(one) == SAMPLES and other.shape == (1, *one.shape[1:])
    ]
    return distance([one for one, _ in rows], [other for _, other in rows]) > FAR


def largest_difference(a: nn.Module, b: nn.Module, samples: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Where two networks differ by more than rounding, in words; None if they do not.

    Both are run in evaluation mode, on several samples and on one, and left as they were.
    """
    for batch in (SAMPLES, 1):
        given = samples[:batch]
        found = distance(run(a, dtype, given.clone())[0], run(b, dtype, given.clone())[0])
        if found <= CLOSE:
            continue
        with in_double(a), in_double(b):
            wide = given.double() if given.is_floating_point() else given
            try:
                exact = distance(run(a, torch.float64, wide.clone())[0], run(b, torch.float64, wide.clone())[0])
            except InputError:  # its code names single precision somewhere
                exact = 0.0 if found < FAR else found
        if exact > CLOSE_IN_DOUBLE:
            return f"by {found:.1e} of the largest output, {batch} {'sample' if batch == 1 else 'samples'} at once"
    return None


def run(model: nn.Module, dtype: torch.dtype, *batches: torch.Tensor, seed: int = 0) -> list[Outputs]:
    """Every tensor of real numbers that a network returns for each batch, one after the other in evaluation mode, each
    with the random numbers of `seed`; it is left as it was.

    Raises: InputError: it does not run.
    """
    found = []
    with undisturbed(model):
        model.eval()
        for batch in batches:
            try:
                with conditions(dtype, seed=seed):
                    returned = model(batch)
            except Exception as error:  # whatever the user's own forward raises
                raise InputError(
                    f"the network does not run on {len(batch)} samples of shape "
                    f"{'x'.join(map(str, batch.shape[1:]))}: {first_line(error)}\nCheck --input-shape and --model-arg."
                ) from error
            found.append([t.detach().clone() for t in all_tensors_of(returned) if t.is_floating_point()])
    return found


def distance(a: Outputs, b: Outputs) -> float:
    """Largest difference of two networks' outputs relative to the largest entry of each; infinite if their number,
    shapes or places of NaN and infinity differ."""
    if [one.shape for one in a] != [other.shape for other in b]:
        return torch.inf
    worst = 0.0
    for one, other in zip(a, b, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        if not bool((same | (one.isfinite() & other.isfinite())).all()):
            return torch.inf
        gap = torch.where(same, 0, one.double() - other.double()).abs()
        if gap.numel() and float(gap.max()) > 0:
            scale = float(torch.where(one.isfinite(), one, 0).abs().max())
            worst = max(worst, float(gap.max()) / max(scale, torch.finfo(torch.float32).tiny))
    return worst


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """Its parameters and buffers in double precision for as long as the block takes, then as they were, bit for bit;
    types of 8 bits and fewer stay, since the network's code unpacks them."""
    wide = (tensor for tensor in tensors_of(model).values() if tensor.is_floating_point() and tensor.element_size() > 1)
    own = {id(tensor): (tensor, tensor.data) for tensor in wide}
    try:
        for tensor, data in own.values():
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in own.values():
            tensor.data = data


def drawn_samples(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Samples of random numbers, or of tokens 0 and 1, as many as are looked at at once."""
    generator = torch.Generator().manual_seed(0)
    size = (SAMPLES, *shape)
    if dtype.is_floating_point:
        return torch.rand(size, generator=generator).to(device, dtype)
    return torch.randint(0, 2, size, generator=generator).to(device, dtype)


def device_of(model: nn.Module) -> torch.device:
    """Where a network's tensors are; the CPU if it has none."""
    return next((tensor.device for tensor in tensors_of(model).values()), torch.device("cpu"))
