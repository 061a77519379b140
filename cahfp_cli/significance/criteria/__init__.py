"""One file a criterion; importing this package fills the registry."""

from cahfp_cli.significance.criteria import (
    bn_scale,
    gate_fisher,
    gate_ggn,
    gate_loss,
    gate_magnitude,
    gate_taylor,
    gate_taylor_signed,
    l1,
    l2,
    lamp,
    obd,
    random,
    weight_fisher,
)

__all__ = [
    "bn_scale",
    "gate_fisher",
    "gate_ggn",
    "gate_loss",
    "gate_magnitude",
    "gate_taylor",
    "gate_taylor_signed",
    "l1",
    "l2",
    "lamp",
    "obd",
    "random",
    "weight_fisher",
]
