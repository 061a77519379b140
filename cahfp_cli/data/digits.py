"""`digits`: 1797 handwritten digits of 8x8 pixels that ship with scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cahfp_cli.data.dataset import Dataset, Labels, make_dataset

BRIGHTEST = 16
TEST_EVERY = 5


def load_digits(split: str, name: str) -> Dataset:
    """The 80% train or 20% test part, (n, 1, 8, 8) in 0..1, in the set's own order."""
    images, y = read_digits()
    x = images.reshape(-1, 1, 8, 8) / BRIGHTEST
    chosen = is_test(y) == (split == "test")
    return make_dataset(x[chosen], y[chosen], name, classes=10)


def read_digits() -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], Labels]:
    """Pixels (1797, 64) in 0..16 and labels (1797,): straight from the file, as importing sklearn takes a second."""
    found = find_spec("sklearn")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            rows = np.loadtxt(file, delimiter=",")
            return rows[:, :-1], rows[:, -1].astype(np.int64)
    from sklearn import datasets

    images, y = datasets.load_digits(return_X_y=True)
    return images, y


def is_test(y: Labels) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Every fifth sample of each class, (n,): stratified, and the same with every version of every library."""
    test = np.zeros(len(y), dtype=np.bool_)
    for label in np.unique(y):
        test[np.flatnonzero(y == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return test
