"""Samples, however they are given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cahfp_cli.data.dataset import Dataset, make_dataset
from cahfp_cli.data.spec import load_data

Data = Dataset | str | tuple[Any, Any]
"""A spec as on the command line (`digits@train`, `npz:FILE`, ...), or samples (n, ...) and labels (n,), as arrays or
tensors."""


def dataset_of(data: Data, classes: int | None = None) -> Dataset:
    """Samples and labels, checked.

    Args: classes: of a pair, how many there are; one more than the largest label without.
    Raises: UsageError, InputError: see data/spec.py and data/dataset.py.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str):
        return load_data(data)
    x, y = (array_of(part) for part in data)
    return make_dataset(x, y, "the given samples", classes)


def array_of(values: Any) -> np.ndarray[Any, Any]:
    """Numbers as an array, whatever device they are on."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, Sequence) and values and isinstance(values[0], torch.Tensor):
        return torch.stack(list(values)).detach().cpu().numpy()
    return np.asarray(values)
