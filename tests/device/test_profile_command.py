"""`cahfp profile`: what a person and what a script see."""

import json

import pytest
from typer.testing import CliRunner, Result

from cahfp_cli.commands.profile import app
from cahfp_cli.device.catalogue import load_profile, profile_names
from cahfp_cli.errors import UsageError

pytestmark = pytest.mark.quick


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_list_shows_every_profile_with_its_budget() -> None:
    result = run("list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["name", "aliases"]
    assert [line.split()[0] for line in lines[2:]] == list(profile_names())
    assert "1.28 TFLOP/s" in result.stdout and "latency 3 ms, memory 256 MB, storage 128 MB" in result.stdout


def test_show_prints_every_figure_with_its_unit_and_source() -> None:
    result = run("show", "jetson")
    assert result.exit_code == 0
    assert result.stdout.startswith("jetson-orin-nano: ")
    for key, figure in load_profile("jetson").figures():
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"{key} "))
        assert line.endswith(figure.source)
        assert f"{figure.value:g}" in line
        assert figure.unit in line or figure.unit == "share"


@pytest.mark.parametrize("name", profile_names())
def test_json_is_one_object_that_holds_the_profile(name: str) -> None:
    content = json.loads(run("show", name, "--json").stdout)
    assert content["name"] == name
    assert content["compute"]["fp32"]["peak"].keys() == {"value", "unit", "source"}
    assert content["budget"]["latency"] > 0


def test_json_list_is_one_object() -> None:
    content = json.loads(run("list", "--json").stdout)
    assert [profile["name"] for profile in content["profiles"]] == list(profile_names())


def test_an_unknown_name_is_a_usage_error() -> None:
    assert isinstance(run("show", "jetsen").exception, UsageError)
