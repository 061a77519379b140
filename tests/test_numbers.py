"""Numbers typed on the command line, over the whole range of what can be typed: answered, or refused by name."""

from pathlib import Path

import pytest

from tests.support.commands import run_here

NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "-1", "", "much", "0x1", "9" * 5000)
MEASURE = ("profile", "measure", "-o", "new.toml")
TRAIN = ("train", "--model", "vgg11", "--data", "digits@train[:64]", "--epochs", "1", "-o", "new.safetensors")
PRUNE = ("prune", "none.safetensors", "--scores", "none", "--profile", "pi4", "-o", "new")
OPTIONS = {
    "--shrink": ("score", "none.safetensors", "-o", "new.safetensors"),
    "--uplink": MEASURE,
    "--downlink": MEASURE,
    "--deadline": ("simulate", "none.toml", "-o", "new"),
    **dict.fromkeys(("--lr", "--momentum", "--weight-decay", "--label-smoothing", "--grad-clip"), TRAIN),
    **dict.fromkeys(("--latency", "--memory", "--storage", "--macs", "--params", "--keep"), PRUNE),
    "--input-shape": ("profile", "predict", "vgg11", "--profile", "pi4"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:8] or "empty")
def test_what_is_no_number_in_range_is_a_usage_error_that_names_the_option(
    option: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run_here(*OPTIONS[option], f"{option}={text}")
    assert refused.code == 2, refused.stderr
    assert option in refused.stderr
    assert len(refused.stderr) < 6000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["infms", "nanms", "-5ms", "0ms", "1e400ms", "ms", "5 parsecs"])
@pytest.mark.parametrize("option", ["--latency", "--memory"])
def test_what_is_no_quantity_is_a_usage_error(option: str, text: str, tmp_path: Path) -> None:
    refused = run_here(*PRUNE[:-1], tmp_path / "new", f"{option}={text}")
    assert (refused.code, option in refused.stderr) == (2, True)


def test_weight_decay_that_overflows_is_refused_before_training(tmp_path: Path) -> None:
    refused = run_here(*TRAIN[:-1], tmp_path / "new", "--weight-decay", "1e38", "--weight-decay", "1e308")
    assert refused.code == 2
    assert "--weight-decay" in refused.stderr
