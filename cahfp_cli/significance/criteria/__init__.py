"""One file a criterion; importing this package fills the registry."""

from cahfp_cli.significance.criteria import gate_fisher, gate_ggn, gate_taylor, l1, l2, random

__all__ = ["gate_fisher", "gate_ggn", "gate_taylor", "l1", "l2", "random"]
