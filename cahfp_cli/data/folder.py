"""`folder:DIR`: one sub-folder of images a class, DIR/CLASS/* or DIR/train/CLASS/* and DIR/test/CLASS/*."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cahfp_cli.data.dataset import WHOLE, Dataset, Rows, make_dataset
from cahfp_cli.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
FORMATS = ("PNG", "JPEG", "BMP")
MODES = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB"}
MOST_PIXELS = 2**24
MOST_BYTES = 2**33


def load_folder(folder: Path, split: str | None, default_split: str, name: str, rows: Rows = WHOLE) -> Dataset:
    """Images of one split, only those of `rows` read, (n, 1 or 3, height, width), all of one size.

    Classes are numbered by their folders' names, sorted (those of `train` where there is one). Samples go round the
    classes, first file of each, then second of each, ..., so that a slice holds all classes.
    Raises: InputError: no such folder or split, no images, an unreadable image, or unequal sizes.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder.")
    root, classes = locate(folder, split, default_split)
    files = [(label, path) for label, c in enumerate(classes) if (root / c).is_dir() for path in images_in(root / c)]
    if not files:
        raise InputError(f"{root}: no images ({', '.join(SUFFIXES)}) in class folders.")
    first, last = rows.of(len(files), name)
    files = round_robin(files)[first:last]
    x = read_images([path for _, path in files])
    return make_dataset(x, np.array([label for label, _ in files]), name, len(classes), first)


def locate(folder: Path, split: str | None, default_split: str) -> tuple[Path, list[str]]:
    """The folder that holds the split's class folders, and the classes in order."""
    if not any(folders_in(folder / s) for s in ("train", "test")):
        if split == "test":
            raise InputError(f"{folder}: has no test/CLASS folders, so there is no @test in it.")
        return folder, folders_in(folder)
    root = folder / (split or default_split)
    present = folders_in(root)
    if not present:
        raise InputError(f"{root}: no class folders, although {folder} has the other split.")
    classes = folders_in(folder / "train") or present
    strange = sorted(set(present) - set(classes))
    if strange:
        raise InputError(f"{root / strange[0]}: this class has no folder under train.")
    return root, classes


def folders_in(folder: Path) -> list[str]:
    """Names of the visible sub-folders, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """Image files, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def round_robin(files: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """First file of each class, second file of each class, ..."""
    seen: dict[int, int] = {}
    ranked = []
    for label, path in files:
        ranked.append((seen.get(label, 0), label, path))
        seen[label] = seen.get(label, 0) + 1
    return [(label, path) for _, label, path in sorted(ranked)]


def read_images(paths: list[Path]) -> npt.NDArray[np.uint8]:
    """All images, uint8 (n, channels, height, width). Raises: InputError: they differ, or are too many to hold."""
    first = read_image(paths[0])
    if first.size * len(paths) > MOST_BYTES:
        raise InputError(f"{paths[0].parent.parent}: {len(paths)} images of {first.size} bytes are too many to hold.")
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for i, path in enumerate(paths):
        image = read_image(path)
        if image.shape != first.shape:
            raise InputError(
                f"{path}: {layout(image)}, but {paths[0].name} is {layout(first)}. "
                "Bring all images to one size and mode."
            )
        images[i] = image
    return images


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """One image, uint8 (1 or 3, height, width). Its size is checked before any pixel is unpacked."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(
                    f"{path}: {image.width}x{image.height} pixels, more than {MOST_PIXELS}. Scale it down."
                )
            if image.mode not in MODES:
                raise InputError(f"{path}: images of mode {image.mode} are not understood. Save it as grey or RGB.")
            pixels: npt.NDArray[Any] = np.asarray(image.convert(MODES[image.mode]), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({type(error).__name__}).") from error
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def layout(image: npt.NDArray[np.uint8]) -> str:
    """'28x28 grey'."""
    channels, height, width = image.shape
    return f"{width}x{height} {'grey' if channels == 1 else 'RGB'}"
