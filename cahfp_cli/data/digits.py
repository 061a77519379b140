"""`digits`: 1797 handwritten digits of 8x8 pixels that ship with scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

import numpy as np

from cahfp_cli.data.dataset import Dataset, Labels, make_dataset

BRIGHTEST = 16
TEST_EVERY = 5


def load_digits(split: str, name: str) -> Dataset:
    """The 80% train or 20% test part, (n, 1, 8, 8) in 0..1, in the set's own order."""
    from sklearn import datasets

    images, y = datasets.load_digits(return_X_y=True)
    x = images.reshape(-1, 1, 8, 8) / BRIGHTEST
    chosen = is_test(y) == (split == "test")
    return make_dataset(x[chosen], y[chosen], name, classes=10)


def is_test(y: Labels) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Every fifth sample of each class, (n,): stratified, and the same with every version of every library."""
    test = np.zeros(len(y), dtype=np.bool_)
    for label in np.unique(y):
        test[np.flatnonzero(y == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return test
