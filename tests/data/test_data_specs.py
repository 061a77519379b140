"""The grammar of data specs, and the sources behind them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cahfp_cli.data.dataset import Dataset, check_fits
from cahfp_cli.data.spec import DataSpec, load_data, parse_spec
from cahfp_cli.errors import InputError, UsageError

pytestmark = pytest.mark.quick

OPEN = st.none() | st.integers(0, 10**9)


@settings(deadline=None)
@given(
    source=st.sampled_from(["digits", "npz:share.npz", "idx:/data/a@b/c", "folder:x[1]y", "my.module:make"]),
    split=st.sampled_from([None, "train", "test"]),
    bounds=st.none() | st.tuples(OPEN, OPEN),
)
def test_parsing_undoes_writing(source: str, split: str | None, bounds: tuple[int | None, int | None] | None) -> None:
    first, last = bounds or (None, None)
    brackets = "" if bounds is None else f"[{'' if first is None else first}:{'' if last is None else last}]"
    spec = source + (f"@{split}" if split else "") + brackets
    assert parse_spec(spec) == DataSpec(source, split, first, last)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        assert parse_spec(text).source
    except UsageError as error:
        assert len(str(error).splitlines()) <= 2 or "\n" in text


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digits@val", "@train or @test"),
        ("digits@", "@train or @test"),
        ("digits[3]", "[first:last]"),
        ("digits[-3:]", "[first:last]"),
        ("digits[1:2:3]", "[first:last]"),
        ("digits]", "[first:last]"),
        ("@train", "names no data set"),
        ("", "names no data set"),
        ("digit", "Did you mean 'digits'"),
        ("npz:", "name a path"),
    ],
)
def test_a_spec_that_is_not_understood_is_a_usage_error(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(spec)
    assert says in str(caught.value)


def test_digits_are_split_80_to_20_stratified_and_without_overlap() -> None:
    train, test = load_data("digits@train"), load_data("digits@test")
    assert len(train) + len(test) == 1797
    assert train.x.dtype == np.float32 and train.y.dtype == np.int64
    assert train.input_shape == (1, 8, 8) and train.classes == 10
    assert train.x.min() == 0 and train.x.max() == 1
    shares = np.bincount(test.y) / (np.bincount(train.y) + np.bincount(test.y))
    assert np.all(np.abs(shares - 0.2) < 0.01)
    assert not {row.tobytes() for row in train.x} & {row.tobytes() for row in test.x}


def test_a_slice_is_cut_from_the_split_and_keeps_the_classes_of_all() -> None:
    whole, part = load_data("digits@test"), load_data("digits@test[10:13]")
    assert np.array_equal(part.x, whole.x[10:13]) and np.array_equal(part.y, whole.y[10:13])
    assert part.classes == 10 and part.name == "digits@test[10:13]"
    assert len(load_data("digits[5:]", default_split="test")) == len(whole) - 5


@pytest.mark.parametrize("bounds", ["[5:5]", "[9:3]", "[0:99999]", "[1442:]"])
def test_a_slice_beyond_the_data_is_an_input_error(bounds: str) -> None:
    with pytest.raises(InputError, match="does not fit, there are 1442 samples"):
        load_data(f"digits@train{bounds}")


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="apt install dataset-fashion-mnist") as caught:
        load_data("fashion-mnist", data_root=tmp_path)
    assert str(tmp_path) in str(caught.value) and "--data-root" in str(caught.value)


def test_data_that_does_not_fit_the_model_names_both_shapes() -> None:
    digits = load_data("digits")
    check_fits(digits, (1, 8, 8), 10)
    with pytest.raises(InputError, match="samples of 1x8x8 do not fit the model, which takes 3x32x32"):
        check_fits(digits, (3, 32, 32), 10)
    with pytest.raises(InputError, match="10 classes do not fit the model, which tells 4 apart"):
        check_fits(digits, (1, 8, 8), 4)


FACTORY = """
import numpy as np
from cahfp_cli.data.dataset import Dataset

def whole():
    return np.ones((4, 2, 9, 9), np.float32), np.arange(4)

def by_split(split):
    return np.zeros((3 if split == "train" else 2, 5)), np.zeros(3 if split == "train" else 2, np.int64)

def dataset():
    return Dataset(np.zeros((2, 7), np.int64), np.array([0, 1]), 5, "own")

def wrong():
    return 3

def fails():
    raise KeyError("no such shard")
"""


@pytest.fixture
def factory_file(tmp_path: Path) -> Path:
    (tmp_path / "shards.py").write_text(FACTORY)
    return tmp_path / "shards.py"


def test_a_factory_in_a_file_gives_arrays_or_a_dataset(factory_file: Path) -> None:
    whole = load_data(f"{factory_file}:whole[1:3]")
    assert whole.x.shape == (2, 2, 9, 9) and whole.y.tolist() == [1, 2] and whole.classes == 4
    assert len(load_data(f"{factory_file}:by_split")) == 3
    assert len(load_data(f"{factory_file}:by_split", default_split="test")) == 2
    assert len(load_data(f"{factory_file}:by_split@test")) == 2
    tokens = load_data(f"{factory_file}:dataset")
    assert tokens.x.dtype == np.int64 and tokens.classes == 5


def test_a_factory_in_a_module_of_the_current_folder_is_found(
    factory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(factory_file.parent)
    assert len(load_data("shards:whole")) == 4


def test_a_factory_that_cannot_be_used_says_why(factory_file: Path) -> None:
    with pytest.raises(UsageError, match="takes no argument 'split'"):
        load_data(f"{factory_file}:whole@test")
    with pytest.raises(UsageError, match=r"Did you mean 'whole'.* It has: by_split, dataset, fails, whole, wrong"):
        load_data(f"{factory_file}:whol")
    with pytest.raises(InputError, match="returned a int"):
        load_data(f"{factory_file}:wrong")
    with pytest.raises(InputError, match="KeyError: 'no such shard'"):
        load_data(f"{factory_file}:fails")


def test_a_dataset_counts_its_samples() -> None:
    assert len(Dataset(np.zeros((3, 1)), np.zeros(3, np.int64), 1, "x")) == 3


def test_loading_data_never_imports_torch() -> None:
    code = (
        "import sys; from cahfp_cli.data.spec import load_data; load_data('digits'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
