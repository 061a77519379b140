"""A wheel built from the checkout works where it is unpacked, without the checkout, profiles included."""

import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.commands import environment

CHECKOUT = Path(__file__).parents[2]
MAIN = "import cahfp_cli.app; print(cahfp_cli.__file__, file=__import__('sys').stderr); cahfp_cli.app.main()"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("hatchling") is None or find_spec("pip") is None:
        pytest.skip("needs hatchling and pip to build a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder)
    done = subprocess.run([*build, CHECKOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("cahfp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(unpacked: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=unpacked.parent,
        env=environment({"PYTHONPATH": str(unpacked)}),
    )
    assert done.stderr.strip() == str(unpacked / "cahfp_cli" / "__init__.py")
    return done


def test_it_says_its_version(unpacked: Path) -> None:
    version = next(unpacked.glob("cahfp-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    assert run(unpacked, "--version").stdout == f"cahfp {version}\n"


def test_it_lists_the_same_profiles_as_the_checkout_has(unpacked: Path) -> None:
    profiles = json.loads(run(unpacked, "profile", "list", "--json").stdout)["profiles"]
    names = {path.stem for path in (CHECKOUT / "profiles").glob("*.toml")}
    assert {profile["name"] for profile in profiles} == names
    assert {path.stem for path in (unpacked / "cahfp_cli" / "device" / "profiles").glob("*.toml")} == names


def test_it_holds_the_package_and_the_command_and_nothing_else(unpacked: Path) -> None:
    assert {path.name.partition("-")[0] for path in unpacked.iterdir()} == {"cahfp_cli", "cahfp"}
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "cahfp = cahfp_cli.app:main" in entry_points.read_text()
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))
    inside = {str(path.relative_to(unpacked / "cahfp_cli")) for path in (unpacked / "cahfp_cli").rglob("*.py")}
    assert inside == {str(path.relative_to(CHECKOUT / "cahfp_cli")) for path in (CHECKOUT / "cahfp_cli").rglob("*.py")}
