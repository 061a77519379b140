"""The curvature of a client's loss in each weight of its submodel, on its own data: `curvature.safetensors`.

Measured is the diagonal of the generalised Gauss-Newton matrix of the mean log-likelihood, which for a softmax is the
Fisher matrix with labels drawn from the model (Martens 2020), as Fisher merging asks for (Matena and Raffel 2022):

    f_i = E_x sum_c p_c(x) (d log p_c(x) / d w_i)^2 = E_x sum_c p_c (J' (p - e_c))_i^2,   J = d logits / d w

Not the empirical Fisher, which has the true label in the place of the sum: where a client fits its data, the gradients
at the true labels vanish whatever the curvature, and where it does not, they measure its error. Nor the labels' noise:
the sum over classes is exact up to `EXACT_CLASSES` of them, and beyond that an unbiased estimate from `DRAWS` labels
drawn from p, so that no sample takes more backward passes than `EXACT_CLASSES`. The labels of the data are not used.

Squares of per-sample gradients cannot be had from the gradient of a batch. Samples go through one by one, in evaluation
mode, where batch norm is a fixed affine map. That takes the memory of one gradient and works for every module; vmap
fails on code that reads values, and on a CPU it was faster for the smallest networks only.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cahfp_cli.checkpoint.metadata import CurvatureMetadata, Provenance, dump_metadata
from cahfp_cli.checkpoint.writer import save_arrays
from cahfp_cli.data.batches import batches
from cahfp_cli.data.dataset import Dataset
from cahfp_cli.errors import InputError
from cahfp_cli.models.tensors import is_finite, saved_state
from cahfp_cli.running.device import repeatable
from cahfp_cli.running.logits import backward, class_logits

EXACT_CLASSES = 16
DRAWS = 16
DRAW_STREAM = 2
"""Sets the drawn labels' random stream apart from the shuffle's."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """arrays: float32, by the name of each weight and of its shape; not negative. samples: how many were measured.
    draws: labels drawn for each of them, None where every class has its share."""

    arrays: dict[str, NDArray[np.float32]]
    samples: int
    draws: int | None


def measure_curvature(
    model: nn.Module,
    names: Iterable[str],
    dataset: Dataset,
    samples: int,
    device: torch.device,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curvature:
    """Measure the curvature in the weights `names`, on the first samples in the order of the first training epoch.

    That order is a shuffle by `seed`, since data are often sorted by class. A weight that the logits do not depend on
    has none. Sums over samples are in float64. On the CPU the result depends only on the model, the data, `samples`,
    `seed` and the number of threads.

    Args:
        model: moved to `device`; runs in evaluation mode and is otherwise left as it is.
        names: float tensors of its state dict, parameters or buffers; of tied ones each name has the same curvature.
        samples: how many; all of the data if it has fewer.
    Raises: InputError: the data does not fit the model, or a sample gives a curvature that is not finite.
    """
    was_training = model.training
    model.to(device).eval()
    state = saved_state(model)
    weights = {name: state[name] for name in names}
    leaves = list({id(tensor): tensor for tensor in weights.values()}.values())
    sums = [torch.zeros(tensor.shape, dtype=torch.float64) for tensor in leaves]
    x, _ = next(batches(dataset, samples, seed=(seed, 0)))
    draws = None
    try:
        with repeatable(seed, device), differentiable(leaves), torch.enable_grad():
            for number, sample in enumerate(x):
                # One output is no mistake here: its curvature is zero.
                logits = class_logits(model, sample[np.newaxis], dataset.classes, device, least=1)
                draws = DRAWS if logits.shape[1] > EXACT_CLASSES else None
                random = np.random.default_rng((seed, number, DRAW_STREAM))
                for total, leaf, own in zip(sums, leaves, squares(logits, leaves, draws, random), strict=True):
                    total += torch.where(
                        is_finite(leaf), own.double(), 0
                    ).cpu()  # an infinite constant stays where it is
                on_progress(number + 1, len(x))
    finally:
        model.train(was_training)
    means = {id(tensor): to_float32(total / len(x)) for tensor, total in zip(leaves, sums, strict=True)}
    arrays = {name: means[id(tensor)] for name, tensor in weights.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"the curvature in {name!r} is not finite on {dataset.name}: check the data and the weights, "
                "or train without --curvature."
            )
    return Curvature(arrays, len(x), draws)


def squares(
    logits: torch.Tensor, leaves: list[torch.Tensor], draws: int | None, random: np.random.Generator
) -> list[torch.Tensor]:
    """sum over classes of share x (gradient of log p_class)^2 in each leaf, for the logits (1, classes) of one sample;
    a share is the model's own probability, or how often the class is among `draws` labels drawn from it."""
    p = logits.detach()[0].cpu().double().softmax(0)
    shares = p.numpy()
    if draws is not None and np.isfinite(shares).all():
        shares = random.multinomial(draws, shares / shares.sum()) / draws
    results = [torch.zeros_like(leaf, dtype=wide(leaf)) for leaf in leaves]
    for label in np.flatnonzero(shares):
        towards = p.clone()
        towards[label] -= 1
        with backward():
            gradients = torch.autograd.grad(
                logits, leaves, towards.to(logits)[None], retain_graph=True, allow_unused=True
            )
        for result, gradient in zip(results, gradients, strict=True):
            if gradient is not None:
                result.add_(gradient.to(result.dtype).square_(), alpha=float(shares[label]))
    return results


def wide(tensor: torch.Tensor) -> torch.dtype:
    """In which its squares are taken: those of half precision and less would vanish."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def to_float32(tensor: torch.Tensor) -> NDArray[np.float32]:
    """As an array; what is too large for float32 becomes infinite."""
    with np.errstate(over="ignore"):
        return tensor.numpy().astype(np.float32)


@contextmanager
def differentiable(leaves: list[torch.Tensor]) -> Iterator[None]:
    """Buffers and frozen parameters have gradients in the block, too."""
    others = [tensor for tensor in leaves if not tensor.requires_grad]
    for tensor in others:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in others:
            tensor.requires_grad_(False)


def write_curvature(path: Path, curvature: Curvature, checkpoint: str, provenance: Provenance) -> None:
    """Write exactly `path` (see checkpoint/atomic.py for safety); equal curvatures give equal bytes.

    Args: checkpoint: content digest of the global checkpoint that the submodel is of.
    """
    metadata = CurvatureMetadata(
        checkpoint=checkpoint, samples=curvature.samples, draws=curvature.draws, provenance=provenance
    )
    save_arrays(path, curvature.arrays, dump_metadata(metadata))
