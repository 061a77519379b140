"""Figures. They need matplotlib (the extra `plots`), but no torch."""
