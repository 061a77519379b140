"""The schema of EXPERIMENT.toml: what is wrong is named by its key."""

from pathlib import Path

import pytest

from cahfp_cli.errors import InputError
from cahfp_cli.federation.experiment import read_experiment
from tests.support.experiments import TOML, experiment, write_toml

pytestmark = pytest.mark.quick


def test_with_masks_that_clients_choose_all_go_by_their_own_scores() -> None:
    with pytest.raises(ValueError, match="leave out cahfp-own"):
        experiment(methods=["cahfp", "cahfp-own"], selection={"by": "client"})
    assert experiment(selection={"by": "client", "criterion": "gate-loss"}).selection.by == "client"


def test_the_small_experiment_is_read(tmp_path: Path) -> None:
    found = read_experiment(write_toml(tmp_path / "e.toml"))
    assert found.clients == 4 and found.rule == "fill" and found.start.cold


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rounds = 2", "round = 2", "unknown key 'round': did you mean 'rounds'"),
        ("rounds = 2", "", "'rounds' is missing"),
        ("rounds = 2", "rounds = 0", "'rounds'"),
        ("rounds = 2", 'rounds = "2"', "'rounds'"),
        ("samples = 16", "sample = 16", "unknown key 'selection.sample': did you mean 'samples'"),
        ("params = 0.25", "params = 1.5", "'fleet.1.params'"),
        ("params = 0.25", "", "'fleet.1'.*how large"),
        ("clients_per_round = 3", "clients_per_round = 5", "the fleet has 4 devices"),
        ('"cahfp"]', '"cahpf"]', "'methods'.*no 'cahpf'"),
        ('"cahfp"]', '"heterofl"]', "'methods'.*twice"),
        ("[selection]", "[train]\nlr = 1e30\n[selection]", "'train.lr'"),
        ("dirichlet(0.5)", "dirichlet(x)", "'partitions'.*alpha"),
        ("rounds = 2", 'rounds = 2\nrule = "mean"', "'rule'.*no 'mean'"),
        ("rounds = 2", "rounds = ", "not valid TOML"),
        ('train = "digits@train[0:300]"\n', "", "'data.train' is missing"),
        ("[data]", "[data]\nclasses = 10", "data.classes belongs to the partition on-device"),
        ("dirichlet(0.5)", "on-device", "data.train must be left out"),
        ('"dirichlet(0.5)"', '"on-device", "iid"', "goes with no other"),
        ("samples = 16", 'samples = 16\ncriterion = "gate-gnn"', "selection.criterion.*no criterion 'gate-gnn'"),
        ("samples = 16", 'samples = 16\ncriterion = "gate-loss"', "may be negative"),
        ("samples = 16", 'by = "client"\ndecay = 0.2', "selection.decay"),
        ("rounds = 2", "rounds = " + "9" * 5000, "not valid TOML"),
        ("[selection]", "[start]\npublic_epochs = 1\n[selection]", "needs data.public"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = write_toml(tmp_path / "e.toml", TOML.replace(old, new, 1))
    with pytest.raises(InputError, match=says) as caught:
        read_experiment(path)
    assert str(caught.value).startswith(str(path)) and str(caught.value).count("\n") <= 1
