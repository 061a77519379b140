"""Which operators the cost model knows: what it does not know it takes for copies, and says so."""

import torch

from cahfp_cli.coupling.rules.pointwise import UNTAGGED

SUMS = frozenset(
    {"sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "any", "all", "std", "var", "var_mean"}
    | {"std_mean", "norm", "linalg_vector_norm", "logsumexp", "count_nonzero", "aminmax"}
)
NORMS = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm", "renorm"})
MOVES = frozenset(
    {"cat", "stack", "repeat", "repeat_interleave", "roll", "flip", "tril", "triu", "constant_pad_nd", "as_strided"}
    | {f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)}
    | {f"upsample_{kind}" for kind in ("linear1d", "bilinear2d", "trilinear3d", "bicubic2d")}
    | {f"upsample_nearest{kind}" for kind in ("1d", "2d", "3d")}
    | {f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)}
    | {"_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d", "grid_sampler"}
    | {"index", "index_select", "gather", "take", "embedding", "_embedding_bag", "scatter", "scatter_", "scatter_add"}
    | {"scatter_reduce", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "index_add", "index_copy"}
    | {"unfold", "im2col", "col2im", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"}
    | {
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "diagonal",
        "diag_embed",
        "diag",
        "one_hot",
        "unsafe_split",
    }
    | {"unsafe_split_with_sizes", "unsafe_chunk", "chunk", "split_copy", "view_as_real", "view_as_complex", "_conj"}
    | {"resolve_conj", "real", "imag", "complex", "polar", "rot90", "swapaxes", "movedim", "flatten", "squeeze_"}
    | {
        "unsqueeze_",
        "t_",
        "transpose_",
        "max_unpool2d",
        "max_unpool3d",
        "_fft_c2r_copy",
        "expand_as",
        "fill",
        "new_full",
    }
    | {"new_zeros", "new_ones", "new_empty", "arange", "zeros", "ones", "full", "scalar_tensor", "_local_scalar_dense"}
    | {"adaptive_max_pool2d", "adaptive_max_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "avg_pool3d"}
    | {"max_pool3d_with_indices", "dim", "sym_size", "lift", "item", "is_nonzero", "equal"}
)
"""Operators that move bytes, or combine a few for each that they write: what they move is what they cost."""


def is_pointwise(name: str) -> bool:
    """Whether an operator of that name works element by element."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return name in UNTAGGED or any(torch.Tag.pointwise in getattr(packet, one).tags for one in packet.overloads())
