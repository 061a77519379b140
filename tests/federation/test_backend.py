"""What `--backend flower` says where it cannot run; needs no Flower."""

from pathlib import Path

import pytest

from cahfp_cli.errors import UsageError
from cahfp_cli.federation.flower import engine
from tests.support.commands import run
from tests.support.experiments import PROVENANCE, experiment, write_toml


@pytest.mark.parametrize("missing", ["flwr", "ray"])
def test_without_flower_the_extra_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(UsageError, match=rf"needs {missing}: pip install 'cahfp\[federated\]'"):
        engine.simulate_on_flower(experiment(), tmp_path / "out", PROVENANCE, deadline=1)
    assert not (tmp_path / "out").exists()


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    done = run("simulate", write_toml(tmp_path / "e.toml"), "-o", tmp_path / "out", "--backend", "rai")
    assert done.code == 2 and "local or flower" in done.stderr
