"""What a network reads: the type of its samples, as files record it and as torch knows it."""

import torch

from cahfp_cli.checkpoint.metadata import InputDtype

TORCH_TYPES: dict[InputDtype, torch.dtype] = {"float32": torch.float32, "int64": torch.int64}


def torch_type(dtype: InputDtype) -> torch.dtype:
    """The recorded type of samples as a torch dtype."""
    return TORCH_TYPES[dtype]
