"""Which profiles there are, and how a name, an alias or a path becomes one."""

import difflib
import os
from functools import cache
from pathlib import Path

from cahfp_cli.device.profile import DeviceProfile, read_profile
from cahfp_cli.errors import InputError, UsageError


def profile_names() -> tuple[str, ...]:
    """Names of the bundled profiles, sorted: their file names."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml")))


def all_profiles() -> tuple[DeviceProfile, ...]:
    """The bundled profiles, by name. Raises InputError if one of them is damaged."""
    return tuple(_bundled(name) for name in profile_names())


def load_profile(name_or_path: str) -> DeviceProfile:
    """The profile of that name or alias, or in that `.toml` file.

    Raises UsageError, with the nearest name, for a name that no profile has, and InputError for a bad file.
    """
    path = profile_path(name_or_path)
    return _bundled(path.stem) if path.parent == _folder() else read_profile(path)


def profile_path(name_or_path: str) -> Path:
    """The file of `load_profile`. Raises: as that, but the file is not read."""
    if name_or_path.endswith(".toml") or os.sep in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"{path}: no such profile; 'cahfp profile list' shows the ones that come with cahfp")
        return path
    name = name_or_path.strip().lower().replace("_", "-")
    if name in profile_names():
        return _folder() / f"{name}.toml"
    profiles = all_profiles()
    for profile in profiles:
        if name in profile.aliases:
            return _folder() / f"{profile.name}.toml"
    known = [known for profile in profiles for known in (profile.name, *profile.aliases)]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean '{nearest[0]}'?" if nearest else "'cahfp profile list' shows the names."
    raise UsageError(f"unknown profile '{name_or_path}': {hint} A profile of your own is given as a path to its .toml.")


def _folder() -> Path:
    """Inside the package when installed from a wheel, at the top of the tree in a checkout."""
    installed = Path(__file__).parent / "profiles"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "profiles"


@cache
def _bundled(name: str) -> DeviceProfile:
    return read_profile(_folder() / f"{name}.toml")
