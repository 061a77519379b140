"""Federated rounds in simulation: clients, devices, methods of selection, and what is measured of them."""
