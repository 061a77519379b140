"""State dicts in PyTorch's own file format, read without running what a pickle may hold."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cahfp_cli.errors import InputError

WRAPPERS = ("state_dict", "model")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt` or `.pth` file: a dict of tensors, or one under the key `state_dict` or `model`.

    Raises: InputError: the file is missing or damaged, needs code to be read, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights" not in str(error).lower():
            raise InputError(f"{path}: not a file that torch.save wrote, or a damaged one.") from error
        raise InputError(
            f"{path}: is a pickle that holds code, not only tensors, and is not read. Where you trust it, convert it:\n"
            "  torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pt')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a file that torch.save wrote, or a damaged one.") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    return checked(content, path)


def checked(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Raises: InputError: `content` is no non-empty mapping of names to plain tensors."""
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors (a state dict).")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise InputError(
                f"{path}: {name!r} is not a plain tensor but a {type(value).__name__}. Save only the state dict: "
                "torch.save(model.state_dict(), 'weights.pt')."
            )
    return dict(content)
