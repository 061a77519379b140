"""`cahfp simulate --backend flower`: the same experiment with every client a node of Flower's simulation on Ray."""

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cahfp_cli.checkpoint.metadata import Provenance
from cahfp_cli.errors import UsageError
from cahfp_cli.federation.experiment import Experiment
from cahfp_cli.federation.run import Row
from cahfp_cli.federation.simulation import Run, check_has_data, check_output, simulate

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Flower and Ray read these when they are imported; nothing of a simulation leaves the machine."""
JOINING = 120.0
"""Seconds until all nodes of a simulation must be there; they are made at its start."""


def simulate_on_flower(
    experiment: Experiment,
    output: Path,
    provenance: Provenance,
    *,
    deadline: float,
    resume: bool = False,
    on_round: Callable[[str, str, int, Row], None] = lambda partition, method, seed, row: None,
) -> tuple[Run, ...]:
    """As `simulate`, with as many threads a client as PyTorch has here, since sums depend on their number.

    Args: deadline: seconds that a client has to answer.
    Raises: UsageError: Flower or Ray is not installed; and as `simulate`.
    """
    check_installed()
    check_has_data(experiment)
    check_output(output, experiment, resume)
    with TemporaryDirectory() as home:
        for name, value in {**OFFLINE, "FLWR_HOME": home}.items():
            os.environ.setdefault(name, value)

        from flwr.app import Context
        from flwr.serverapp import Grid, ServerApp
        from flwr.simulation import run_simulation

        from cahfp_cli.federation.flower.client import make_client_app
        from cahfp_cli.federation.flower.server import FlowerClients

        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        runs: list[Run] = []
        threads, text = torch.get_num_threads(), experiment.model_dump_json()

        def main(grid: Grid, context: Context) -> None:
            fleet = FlowerClients(grid, deadline, JOINING)
            runs.extend(simulate(experiment, output, provenance, resume=resume, fleet=fleet, on_round=on_round))

        server = ServerApp()
        server.main()(main)
        clients = make_client_app(lambda context: text, threads)
        cores = max(1, min(threads, os.cpu_count() or 1))
        resources: dict[str, Any] = {
            "client_resources": {"num_cpus": cores, "num_gpus": 0.0},
            "init_args": {"log_to_driver": False, "logging_level": logging.ERROR},
        }
        run_simulation(server, clients, experiment.clients, backend_config=resources)
    return tuple(runs)


def check_installed() -> None:
    """Raises: UsageError: Flower or Ray is not."""
    for name in ("flwr", "ray"):
        if find_spec(name) is None:
            raise UsageError(f"--backend flower needs {name}: pip install 'cahfp[federated]'.")
