"""Curvature-aware, device-specific structured pruning with model reconstruction."""

__version__ = "0.1.0"
