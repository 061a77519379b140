"""The apps that a Flower app folder names as its components, for SuperLink and SuperNodes on many machines.

Both read the experiment from a file: that of the run's configuration (`experiment`), or on a node that of the node's
own, if it has one. A node's configuration says which client it is (`client`), and where its own data is (`data`) with
the partition on-device, and what device it is (`profile`).
"""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cahfp_cli.federation.experiment import Experiment, read_experiment
from cahfp_cli.federation.flower.client import make_client_app
from cahfp_cli.federation.flower.server import FlowerClients
from cahfp_cli.federation.run import Row
from cahfp_cli.federation.simulation import EXPERIMENT, check_merged, simulate
from cahfp_cli.provenance import provenance
from cahfp_cli.running.device import use_threads

LOG = logging.getLogger("flwr")
THREADS = 1
"""Of the server and of each client, so that results do not depend on the machine."""


def experiment_of(context: Context) -> str:
    """The experiment as JSON."""
    path = context.node_config.get("experiment", context.run_config["experiment"])
    return read_experiment(Path(str(path))).model_dump_json()


def serve(grid: Grid, context: Context) -> None:
    """Run the experiment. Its run configuration has experiment, output, resume, and in seconds joining and deadline."""
    config = context.run_config
    path, output = Path(str(config["experiment"])), Path(str(config["output"]))
    use_threads(THREADS)

    def committed(partition: str, method: str, seed: int, row: Row) -> None:
        LOG.info("%s, %s, seed %d, round %d committed", partition, method, seed, row["round"])
        for client, why in row["dropped"].items():
            LOG.warning("round %d: client %s dropped: %s", row["round"], client, why)
        for client, why in row["unscored"].items():
            LOG.warning("round %d: client %s keeps its mask: %s", row["round"], client, why)

    fleet = FlowerClients(grid, float(config["deadline"]), float(config["joining"]))
    resume, source = bool(config["resume"]), provenance("federate", {}, [path])
    asked = described(read_experiment(path), fleet, output if resume else None)
    check_merged(simulate(asked, output, source, resume=resume, fleet=fleet, on_round=committed))


def described(asked: Experiment, fleet: FlowerClients, output: Path | None) -> Experiment:
    """The experiment with the devices that nodes report; those that `output` recorded stay."""
    if not asked.reported:
        return asked
    profiles: dict[int, str] = {}
    if output is not None and (output / EXPERIMENT).exists():
        recorded = Experiment.model_validate_json((output / EXPERIMENT).read_text())
        devices = [entry for entry in recorded.fleet for _ in range(entry.count)]
        profiles = {client: one.profile_text for client, one in enumerate(devices) if one.profile_text is not None}
    fleet.meet(asked.clients)
    return asked.with_reports(fleet.profiles | profiles)


server_app = ServerApp()
server_app.main()(serve)
client_app = make_client_app(experiment_of, THREADS)
