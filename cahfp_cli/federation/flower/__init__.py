"""Rounds over Flower: the server's side of a `Grid`, the client's app, and the two engines that run them.

Only this package imports flwr, and only where `--backend flower` or a Flower app asks for it.
"""
