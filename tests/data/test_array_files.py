"""idx and npz files, folders of images, and the checks on arrays: sound ones and hostile ones."""

import gzip
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cahfp_cli.data.batches import batches
from cahfp_cli.data.dataset import make_dataset
from cahfp_cli.data.idx import read_idx
from cahfp_cli.data.spec import load_data
from cahfp_cli.errors import InputError

pytestmark = pytest.mark.quick

IMAGES = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)


def idx_bytes(array: np.ndarray[Any, Any], kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def idx_folder(folder: Path, labels: list[int]) -> Path:
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.array(labels, np.uint8))))
    return folder


def test_idx_images_are_scaled_and_get_a_channel(tmp_path: Path) -> None:
    data = load_data(f"idx:{idx_folder(tmp_path, [0, 2, 1])}@train")
    assert data.x.shape == (3, 1, 2, 4) and data.classes == 3 and data.y.tolist() == [0, 2, 1]
    assert np.array_equal(data.x[:, 0], IMAGES.astype(np.float32) / np.float32(255))


def test_idx_classes_count_the_labels_of_both_splits(tmp_path: Path) -> None:
    idx_folder(tmp_path, [0, 1, 1])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([6], np.uint8)))
    assert load_data(f"idx:{tmp_path}").classes == 7


def test_idx_without_the_split_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file t10k-images-idx3-ubyte or"):
        load_data(f"idx:{idx_folder(tmp_path, [0, 1, 2])}@test")


def test_idx_with_fewer_labels_than_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 samples but 2 labels"):
        load_data(f"idx:{idx_folder(tmp_path, [0, 1])}")


SOUND = idx_bytes(IMAGES)
HUGE = struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an idx file"),
        (SOUND[:10], "not an idx file"),
        (b"\x80\x02" + SOUND, "not an idx file"),
        (idx_bytes(IMAGES, kind=13), "not an idx file"),
        (idx_bytes(IMAGES[0]), "not an idx file"),
        (SOUND[:-1], "cut short"),
        (SOUND + b"\0", "left over"),
        (HUGE, "more than the file can hold"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_lying_idx_file_is_refused_whether_compressed_or_not(
    content: bytes, says: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(InputError, match=f"{says}|cut short|more than the file can hold") as caught:
        read_idx(path, axes=3)
    assert str(path) in str(caught.value)


def test_a_gzip_bomb_is_read_no_further_than_the_header_promises(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(SOUND + bytes(200_000_000), compresslevel=1))
    with pytest.raises(InputError, match="left over"):
        read_idx(path, axes=3)


@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped"])
def test_a_damaged_gzip_file_is_refused(damage: str, tmp_path: Path) -> None:
    packed = gzip.compress(SOUND)
    content = {"cut": packed[:-9], "garbage": b"not gzip", "flipped": packed[:-6] + b"\xff" + packed[-5:]}[damage]
    (tmp_path / "images.gz").write_bytes(content)
    with pytest.raises(InputError, match="damaged gzip"):
        read_idx(tmp_path / "images.gz", axes=3)


def test_npz_of_x_and_y_is_taken_whole_and_has_no_test_split(tmp_path: Path) -> None:
    path = tmp_path / "share.npz"
    np.savez(path, x=np.zeros((5, 3, 8, 8), np.float64), y=np.array([0, 1, 1, 4, 0]))
    assert len(load_data(f"npz:{path}")) == len(load_data(f"npz:{path}@train")) == 5
    assert len(load_data(f"npz:{path}", default_split="test")) == 5
    data = load_data(f"npz:{path}@train[1:]")
    assert data.x.dtype == np.float32 and data.classes == 5 and len(data) == 4
    with pytest.raises(InputError, match="no x_test and y_test"):
        load_data(f"npz:{path}@test")


def test_npz_with_splits_counts_classes_over_both_unless_it_states_them(tmp_path: Path) -> None:
    path = tmp_path / "both.npz"
    arrays = {"x_train": IMAGES, "y_train": np.array([0, 0, 1]), "x_test": IMAGES[:1], "y_test": np.array([7])}
    np.savez_compressed(path, **arrays)
    assert load_data(f"npz:{path}@train").classes == 8
    assert len(load_data(f"npz:{path}", default_split="test")) == 1
    np.savez(path, **arrays, classes=12)
    assert load_data(f"npz:{path}@test").classes == 12
    np.savez(path, **arrays, classes=np.array([12]))
    with pytest.raises(InputError, match="'classes' must be one positive integer"):
        load_data(f"npz:{path}")


def test_npz_that_is_not_plain_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(InputError, match="no such file"):
        load_data(f"npz:{path}")
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="not an npz archive"):
        load_data(f"npz:{path}")
    np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.zeros(1, np.int64))
    with pytest.raises(InputError, match="not an npz archive of plain arrays"):
        load_data(f"npz:{path}")
    np.savez(path, x=IMAGES)
    with pytest.raises(InputError, match=r"has no array 'y'\. It has x"):
        load_data(f"npz:{path}")


def test_npz_whose_header_promises_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(InputError, match="not an npz archive"):
        load_data(f"npz:{tmp_path / 'lie.npz'}")


@pytest.mark.parametrize("header", [b"{'descr': '<f4", b"(" * 20, b'{\'descr\': """', b"\x00 \n \t x("])
def test_npz_whose_header_is_no_python_literal_is_refused(header: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(InputError, match="not an npz archive"):
        load_data(f"npz:{tmp_path / 'odd.npz'}")


def save_image(path: Path, size: tuple[int, int] = (9, 8), mode: str = "L", value: int = 51) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def test_folder_numbers_classes_by_name_and_goes_round_them(tmp_path: Path) -> None:
    for name in ("b/1.png", "b/2.png", "a/1.png", "c/x.bmp"):
        save_image(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = load_data(f"folder:{tmp_path}")
    assert data.x.shape == (4, 1, 8, 9) and data.y.tolist() == [0, 1, 2, 1] and data.classes == 3
    assert np.all(data.x == np.float32(51) / np.float32(255))
    with pytest.raises(InputError, match="no @test in it"):
        load_data(f"folder:{tmp_path}@test")


def test_folder_with_splits_takes_the_classes_of_train(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "test/dog/1.png"):
        save_image(tmp_path / name, mode="RGB")
    data = load_data(f"folder:{tmp_path}@test")
    assert data.y.tolist() == [1] and data.classes == 2 and data.input_shape == (3, 8, 9)
    save_image(tmp_path / "test" / "eel" / "1.png", mode="RGB")
    with pytest.raises(InputError, match="eel: this class has no folder under train"):
        load_data(f"folder:{tmp_path}@test")


def test_folder_names_the_image_that_differs_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_data(f"folder:{tmp_path / 'none'}")
    with pytest.raises(InputError, match="no images"):
        load_data(f"folder:{tmp_path}")
    save_image(tmp_path / "a" / "1.png")
    save_image(tmp_path / "b" / "2.png", size=(7, 8))
    with pytest.raises(InputError, match=r"2\.png: 7x8 grey, but 1\.png is 9x8 grey"):
        load_data(f"folder:{tmp_path}")
    save_image(tmp_path / "b" / "2.png", mode="RGB")
    with pytest.raises(InputError, match=r"2\.png: 9x8 RGB"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "b" / "2.png").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"2\.png: not a readable image"):
        load_data(f"folder:{tmp_path}")


@pytest.mark.parametrize("side", [5000, 20000])
def test_an_image_bomb_is_refused_before_it_is_unpacked(side: int, tmp_path: Path) -> None:
    save_image(tmp_path / "a" / "1.png")
    content = bytearray((tmp_path / "a" / "1.png").read_bytes())
    content[16:24] = struct.pack(">II", side, side)  # width and height in the IHDR chunk
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    (tmp_path / "a" / "1.png").write_bytes(content)
    with pytest.raises(InputError, match=r"1\.png: (5000x5000 pixels, more than|not a readable image)"):
        load_data(f"folder:{tmp_path}")


def numbers(rows: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(rows, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (3, 7), (5, 9), (0, 9)])
def test_a_slice_of_an_npz_is_what_numpy_cuts(save: Any, order: str, first: int, last: int, tmp_path: Path) -> None:
    x, y = numbers(9), np.arange(9)
    save(tmp_path / "d.npz", x=np.asarray(x, order=order), y=y)  # type: ignore[call-overload]
    data = load_data(f"npz:{tmp_path / 'd.npz'}[{first}:{last}]")
    assert np.array_equal(data.x, x[first:last]) and np.array_equal(data.y, y[first:last]) and data.classes == 9


def test_a_slice_of_an_npz_reads_and_keeps_no_other_samples(tmp_path: Path) -> None:
    x = np.zeros((100, 50_000), np.float32)
    x[70] = np.nan
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "d.npz", x=x, y=np.zeros(100, np.int64))  # type: ignore[operator]
        tracemalloc.start()
        data = load_data(f"npz:{tmp_path / 'd.npz'}[10:12]")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(data) == 2 and peak < 5_000_000 < x.nbytes
        with pytest.raises(InputError, match="sample 70 holds NaN"):
            load_data(f"npz:{tmp_path / 'd.npz'}[60:]")


def test_lengths_are_compared_before_a_slice_is_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=numbers(9), y=np.zeros(8, np.int64))
    with pytest.raises(InputError, match="9 samples but 8 labels"):
        load_data(f"npz:{tmp_path / 'd.npz'}[0:2]")
    with pytest.raises(InputError, match="3 samples but 2 labels"):
        load_data(f"idx:{idx_folder(tmp_path, [0, 1])}[0:1]")


def test_a_slice_of_a_folder_opens_no_other_image(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "a/2.png"):
        save_image(tmp_path / name)
    (tmp_path / "b" / "2.png").write_bytes(b"no image")
    data = load_data(f"folder:{tmp_path}[1:3]")
    assert data.y.tolist() == [1, 0] and data.classes == 2
    with pytest.raises(InputError, match="does not fit, there are 4 samples"):
        load_data(f"folder:{tmp_path}[1:5]")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_slice_of_an_idx_file_unpacks_no_further(suffix: str, tmp_path: Path) -> None:
    idx_folder(tmp_path, [0, 2, 1])
    (tmp_path / "train-images-idx3-ubyte").unlink()
    content = bytearray(gzip.compress(SOUND) if suffix else SOUND)
    if suffix:
        content[-5] ^= 255  # the length at the end, which only the whole is compared with
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes(content)
    data = load_data(f"idx:{tmp_path}[1:2]")
    assert np.array_equal(data.x[0, 0], IMAGES[1].astype(np.float32) / np.float32(255)) and data.classes == 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("cut", ["", "[1:2]"])
def test_a_damaged_npz_is_read_or_refused_whatever_byte_is_wrong(save: Any, cut: str, tmp_path: Path) -> None:
    save(tmp_path / "sound.npz", x=numbers(3), y=np.arange(3))
    sound, path = (tmp_path / "sound.npz").read_bytes(), tmp_path / "bad.npz"
    random = np.random.default_rng(1)
    for place in random.permutation(len(sound))[:300]:
        damaged = bytearray(sound)
        damaged[place] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_data(f"npz:{path}{cut}")
        except InputError as error:
            assert str(error).startswith((str(path), "npz:"))


X = np.zeros((3, 1, 8, 8), np.float32)
Y = np.arange(3)


def with_value(value: float) -> np.ndarray[Any, Any]:
    x = X.astype(np.float64)
    x[1, 0, 3, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "classes", "says"),
    [
        (X[:0], Y[:0], None, "holds no samples"),
        (X, Y[:2], None, "3 samples but 2 labels"),
        (X, Y.astype(np.float32), None, "labels must be integers"),
        (X, Y[:, None], None, "labels must be integers of shape"),
        (X, Y - 1, None, "sample 0 has label -1"),
        (X, Y, 2, "sample 2 has label 2, but labels go from 0 to 1"),
        (with_value(np.nan), Y, None, "sample 1 holds NaN or Inf"),
        (with_value(1e300), Y, None, "sample 1 holds NaN or Inf"),
        (X.astype(np.int32), Y, None, "give images as uint8"),
        (X.astype(np.complex64), Y, None, "not understood"),
        (X.astype(str), Y, None, "not understood"),
        (X[:, 0, 0, 0], Y, None, "must have shape"),
        (np.zeros((3, 8, 8, 3), np.uint8), Y, None, "channels last"),
        (np.zeros((3, 0, 8, 8), np.float32), Y, None, "must have shape"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(x: Any, y: Any, classes: int | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_dataset(x, y, "mine", classes)


def test_batches_cover_each_sample_once_in_an_order_of_the_seed() -> None:
    data = make_dataset(np.arange(10.0)[:, None], np.arange(10), "ten")
    plain = list(batches(data, 4, seed=None))
    assert [len(y) for _, y in plain] == [4, 4, 2] and plain[2][1].tolist() == [8, 9]
    first, again, other = (np.concatenate([y for _, y in batches(data, 4, seed=s)]) for s in (1, 1, (1, 2)))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert sorted(first) == sorted(other) == list(range(10))
    assert all(np.array_equal(x[:, 0], y) for x, y in batches(data, 3, seed=5))
