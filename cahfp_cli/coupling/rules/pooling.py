"""Pooling, resizing and padding: channels pass, space changes."""

from cahfp_cli.coupling.atoms import Labels, fixed
from cahfp_cli.coupling.registry import Axes, Call, Couplings, Result, rule


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "reflection_pad2d",
    "replication_pad2d",
)
def spatial(couplings: Couplings, call: Call) -> Result:
    """Works inside each channel; the axes it changes are those after the channels."""
    x = call.axes("self" if "self" in call.arguments else "input")

    def carry(shape: tuple[int, ...]) -> Axes:
        spatial_axes = {"1d": 1, "2d": 2, "3d": 3}[next(d for d in ("1d", "2d", "3d") if d in str(call.op))]
        kept = len(shape) - spatial_axes
        for labels in x[kept:]:
            couplings.atoms.pin(labels, "pooled or resized axis")
        return (*x[:kept], *(fixed(n) for n in shape[kept:]))

    if isinstance(call.output, tuple | list):
        return [carry(tuple(out.shape)) for out in call.output]
    return carry(tuple(call.output.shape))


@rule("constant_pad_nd")
def constant_pad(couplings: Couplings, call: Call) -> Axes:
    """An axis that is padded or cropped is pinned: the amounts are constants."""
    x, pads = call.axes("self"), call["pad"]

    def padded(labels: Labels, before: int, after: int, length: int) -> Labels:
        if before == after == 0:
            return labels
        couplings.atoms.pin(labels, "padded axis")
        return fixed(length)

    by_axis = [(pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)][::-1]  # pads start at the last axis
    untouched = len(x) - len(by_axis)
    changed = [
        padded(labels, before, after, call.output.shape[untouched + i])
        for i, (labels, (before, after)) in enumerate(zip(x[untouched:], by_axis, strict=True))
    ]
    return (*x[:untouched], *changed)
