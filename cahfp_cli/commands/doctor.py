"""`cahfp doctor`: what is installed, what is missing, and what this machine can do.

It imports what it looks at inside functions, and takes whatever an import raises for an answer; importlib.metadata too,
since that costs help a third of its time.
"""

import importlib
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from cahfp_cli import __version__
from cahfp_cli.commands import options
from cahfp_cli.errors import InputError, first_line
from cahfp_cli.output import Console, Json, table

if TYPE_CHECKING:
    from packaging.requirements import Requirement

NAME = "cahfp"
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}
"""What to import, of packages whose modules have another name."""
FOR_DEVELOPERS = ("dev", "docs")


@dataclass(frozen=True)
class Package:
    """One package that cahfp needs, or takes for an extra.

    version: None where it is not installed. wanted: the range, such as `>=2.13`. state: `other` is a version out of the
    range, `broken` one that cannot be imported, with the `reason`.
    """

    name: str
    version: str | None
    wanted: str
    state: Literal["fine", "other", "missing", "broken"]
    reason: str | None = None

    @property
    def is_usable(self) -> bool:
        return self.state in ("fine", "other")


def doctor(json: options.Json = False) -> None:
    """Check the installation: versions, what is missing, and what this machine can do."""
    found = examination()
    Console(json).result(human(found), found)
    if not found["usable"]:
        raise InputError(f"cahfp cannot work here: {'; '.join(found['problems'])}")


def examination() -> Json:
    """What there is to say, as JSON."""
    needed, extras = packages()
    python = wanted_python()
    problems = [problem for package in needed if (problem := problem_of(package)) is not None]
    for packages_of in extras.values():  # what is not there is not wanted
        problems += [p for package in packages_of if package.state != "missing" and (p := problem_of(package))]
    if not needed:
        problems.append(f"{NAME} is not installed: run `pip install .` in its folder")
    if python is not None and not contains(python, platform.python_version()):
        problems.append(f"Python {platform.python_version()} is not {python}, the versions that cahfp is made for")
    return {
        "cahfp": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": [asdict(package) for package in needed],
        "extras": [
            {
                "name": name,
                "complete": all(package.is_usable for package in found),
                "install": f"pip install '{NAME}[{name}]'",
                "packages": [asdict(package) for package in found],
            }
            for name, found in extras.items()
        ],
        "machine": machine(),
        "problems": list(dict.fromkeys(problems)),
        "usable": bool(needed) and all(package.is_usable for package in needed),
    }


def packages() -> tuple[list[Package], dict[str, list[Package]]]:
    """Packages that cahfp needs, and those of each extra; none where cahfp itself is not installed."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        about = metadata(NAME)
        from packaging.requirements import Requirement
    except PackageNotFoundError:
        return [], {}
    except ModuleNotFoundError:  # which ONNX Runtime needs too
        return [Package("packaging", None, "", "missing")], {}
    asked = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    seen: dict[str, Package] = {}

    def look(requirement: Requirement) -> Package:
        key = f"{requirement.name}{requirement.specifier}"
        if key not in seen:
            seen[key] = examine(requirement)
        return seen[key]

    needed = [look(one) for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    extras: dict[str, list[Package]] = {}
    for extra in about.get_all("Provides-Extra") or []:
        own = [
            look(one)
            for one in asked
            if one.name != NAME and one.marker is not None and one.marker.evaluate({"extra": extra})
        ]
        if own and extra not in FOR_DEVELOPERS:
            extras[extra] = own
    return needed, extras


def examine(requirement: "Requirement") -> Package:
    """Import a package and compare its version."""
    from importlib.metadata import PackageNotFoundError, version

    name, wanted = requirement.name, str(requirement.specifier)
    try:
        there = version(name)
    except PackageNotFoundError:
        return Package(name, None, wanted, "missing")
    try:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # whatever its parts raise
        return Package(name, there, wanted, "broken", f"{type(error).__name__}: {first_line(error)}")
    return Package(name, there, wanted, "fine" if contains(wanted, there) else "other")


def contains(wanted: str, there: str) -> bool:
    """Whether a version is in a range; one that is no version is not."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(wanted).contains(there, prereleases=True)
    except InvalidVersion:
        return False


def wanted_python() -> str | None:
    """The range of Python's versions, where it can be read."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        importlib.import_module("packaging")
        return next(iter(metadata(NAME).get_all("Requires-Python") or []), None)
    except (PackageNotFoundError, ModuleNotFoundError):
        return None


def problem_of(package: Package) -> str | None:
    """One sentence, None if all is well."""
    match package.state:
        case "missing":
            return f"{package.name} is missing: pip install '{package.name}{package.wanted}'"
        case "broken":
            return f"{package.name} {package.version} cannot be imported: {package.reason}"
        case "other":
            return f"{package.name} {package.version} is not {package.wanted}, the versions that cahfp is tested with"
    return None


def machine() -> Json:
    """The CPU, and where networks can run."""
    from cahfp_cli.running.processor import instructions, processor, usable_cores

    return {
        "processor": processor(),
        "cores": usable_cores(),
        "instructions": list(instructions()),
        **of_torch(),
        "providers": providers(),
    }


def of_torch() -> Json:
    """Threads and devices of PyTorch; nothing where it does not work."""
    try:
        import torch
    except Exception:  # already told of
        return {"threads": None, "devices": []}
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return {"threads": torch.get_num_threads(), "devices": [name for name, is_there in there.items() if is_there]}


def providers() -> list[str]:
    """Execution providers of ONNX Runtime; none where it does not work."""
    try:
        import onnxruntime
    except Exception:  # already told of
        return []
    return list(onnxruntime.get_available_providers())


def human(found: Json) -> str:
    """The same for people."""
    here = found["machine"]
    fast = "int8 is fast here" if {"VNNI", "dot products"} & set(here["instructions"]) else "int8 may be no faster here"
    cores = f"{here['cores']} core{'s' * (here['cores'] != 1)}"
    lines = [
        f"cahfp {found['cahfp']}, Python {found['python']}, {found['system']}",
        "",
        table(("package", "version", "wanted", "state"), [row(package) for package in found["packages"]]),
        "",
        *(extra_line(extra) for extra in found["extras"]),
        "",
        f"CPU           {here['processor']}, {cores}",
        f"instructions  {', '.join(here['instructions']) or 'not known'}: {fast}",
        f"PyTorch       {', '.join(here['devices']) or 'not there'}"
        + (f", {here['threads']} threads" if here["threads"] else ""),
        f"ONNX Runtime  {', '.join(here['providers']) or 'not there'}",
        "",
        *(found["problems"] or ["nothing is wrong"]),
    ]
    return "\n".join(lines)


def row(package: dict[str, Any]) -> tuple[str, str, str, str]:
    return package["name"], package["version"] or "-", package["wanted"], package["state"]


def extra_line(extra: dict[str, Any]) -> str:
    """Such as `plots: matplotlib 3.11.2`, or what is missing and how to get it."""
    there = [f"{p['name']} {p['version']}" for p in extra["packages"] if p["version"] is not None]
    missing = [p["name"] for p in extra["packages"] if p["version"] is None]
    parts = [*there, *([f"without {', '.join(missing)} ({extra['install']})"] if missing else [])]
    return f"extra {extra['name']}: {', '.join(parts)}"
