"""The direction of dependencies (DESIGN.md section 5), and what must never import torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import COMMAND, environment
from tests.support.fleet import Clients, Fleet

PACKAGE = Path(__file__).parents[1] / "cahfp_cli"
ORDER = (
    *("__init__", "errors", "factories", "checkpoint", "provenance", "formats"),
    *("models", "data", "coupling", "running", "training", "device", "export"),
    *("significance", "pruning", "reconstruction", "plots", "federation", "library"),
    *("output", "commands", "app", "__main__"),
)
"""Each imports only what stands before it."""
RANK = {name: number for number, name in enumerate(ORDER)}
CORE = ORDER[: RANK["output"]]
TORCH_FREE = (
    "cahfp_cli.checkpoint",
    "cahfp_cli.reconstruction",
    "cahfp_cli.formats",
    "cahfp_cli.device.profile",
    "cahfp_cli.device.catalogue",
    "cahfp_cli.significance.scores",
    "cahfp_cli.provenance",
    "cahfp_cli.errors",
    "cahfp_cli.output",
    "cahfp_cli.app",
    "cahfp_cli.commands",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The package or module directly under `cahfp_cli` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each dotted name that a file imports, and whether at module level (not in a function, not for types only)."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in lazy


def own(name: str) -> str | None:
    """The part of `cahfp_cli` that a dotted name lies in, None for another package."""
    head, _, rest = name.partition(".")
    if head != "cahfp_cli":
        return None
    first = rest.partition(".")[0]
    return first if first in RANK else "__init__"


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    assert {part(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    for name, eager in imports(path):
        target = own(name)
        if part(path) == "__init__" and not eager:
            continue  # the names that the package offers come when they are used
        if target is not None and target != part(path):
            assert RANK[target] < RANK[part(path)], f"{part(path)} imports {name}"


@pytest.mark.parametrize("name", CORE)
def test_core_neither_prints_nor_knows_of_the_command_line(name: str) -> None:
    for path in (path for path in FILES if part(path) == name):
        for target, _ in imports(path):
            assert target.partition(".")[0] not in ("typer", "rich", "click", "argparse"), path
            assert own(target) != "output", path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                assert node.id != "print", path
            elif isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("sys.stdout", "sys.stderr", "sys.exit"), path


def test_only_rounds_over_flower_import_flower_and_nothing_imports_those_eagerly() -> None:
    for path in FILES:
        inside = "flower" in path.relative_to(PACKAGE).parts
        for name, eager in imports(path):
            assert inside or name.partition(".")[0] not in ("flwr", "ray"), f"{path} imports {name}"
            assert inside or not eager or not name.startswith("cahfp_cli.federation.flower"), f"{path} imports {name}"


def test_commands_do_not_import_one_another_and_share_only_what_is_no_command() -> None:
    for path in (PACKAGE / "commands").glob("*.py"):
        for name, _ in imports(path):
            if name.startswith("cahfp_cli.commands"):
                assert name.split(".")[2] in ("options", "helping", "guides", "networks", "live"), (
                    f"{path.name} imports {name}"
                )


def modules() -> list[str]:
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES]
    return [
        name.removesuffix(".__init__")
        for name in names
        if name != "cahfp_cli.__main__" and any(name == free or name.startswith(f"{free}.") for free in TORCH_FREE)
    ]


def test_what_is_torch_free_imports_neither_torch_nor_a_network_library() -> None:
    code = f"""
import importlib, sys
for name in {modules()!r}:
    importlib.import_module(name)
    heavy = {{"torch", "onnx", "onnxruntime", "sklearn", "transformers", "timm"}} & sys.modules.keys()
    assert not heavy, (name, heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


BLOCK_TORCH = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise RuntimeError("TORCH WAS IMPORTED")


sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the installed command cannot import torch."""
    folder = tmp_path_factory.mktemp("blocker")
    (folder / "sitecustomize.py").write_text(BLOCK_TORCH)
    return environment({"PYTHONPATH": str(folder), "CAHFP_DEBUG": "1"})


def run(env: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(COMMAND), *map(str, arguments)], capture_output=True, text=True, check=False, env=env)


def test_the_blocker_blocks(without_torch: dict[str, str], fleet: Fleet) -> None:
    done = run(without_torch, "evaluate", fleet.checkpoint)
    assert done.returncode == 1 and "TORCH WAS IMPORTED" in done.stderr


COMMANDS = ("train", "score", "prune", "evaluate", "reconstruct", "inspect", "profile", "simulate", "doctor")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("profile", "predict")], ids=" ".join)
def test_help_needs_no_torch(without_torch: dict[str, str], command: tuple[str, ...]) -> None:
    done = run(without_torch, *command, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: cahfp")
    if not command:
        assert all(name in done.stdout for name in COMMANDS)


def test_version_and_profiles_need_no_torch(without_torch: dict[str, str]) -> None:
    assert run(without_torch, "--version").stdout.startswith("cahfp ")
    assert "stm32h743" in run(without_torch, "profile", "list").stdout
    assert "Cortex-M7" in run(without_torch, "profile", "show", "stm32").stdout


def test_completion_needs_no_torch(without_torch: dict[str, str]) -> None:
    asked = {**without_torch, "_CAHFP_COMPLETE": "complete_bash", "COMP_WORDS": "cahfp re", "COMP_CWORD": "1"}
    assert run(asked).stdout.split() == ["reconstruct"]


def test_inspect_needs_no_torch(without_torch: dict[str, str], fleet: Fleet, clients: Clients) -> None:
    submodel = clients.folders["stm32h743"]
    files = [fleet.checkpoint, fleet.scores, clients.merged, fleet.folder / "fleet", *sorted(submodel.iterdir())]
    for path in files:
        assert run(without_torch, "inspect", path, "--json").returncode == 0, path


def test_reconstruct_needs_no_torch(
    without_torch: dict[str, str], fleet: Fleet, clients: Clients, tmp_path: Path
) -> None:
    output = tmp_path / "merged.safetensors"
    done = run(without_torch, "reconstruct", fleet.checkpoint, *clients.folders.values(), "-o", output)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == clients.merged.read_bytes()
