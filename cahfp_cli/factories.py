"""Running a factory that the user named: `package.module:factory` or `path/to/file.py:factory`.

This executes the user's own code, so only a spec given by the user may come here, never one read from a file.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from cahfp_cli.errors import CahfpError, InputError, UsageError

Factory = Callable[..., object]


def run_factory(spec: str, given: Mapping[str, Any], offered: Mapping[str, Any]) -> object:
    """Import the factory that `spec` names and call it.

    Args:
        given: keyword arguments that the user asked for; the factory must take every one.
        offered: keyword arguments that we know; each is passed if the factory has a parameter of that name.
    Raises: UsageError: no such module, file or factory, or its arguments do not match; InputError: its code raises.
    """
    target, _, name = spec.rpartition(":")
    is_file = target.endswith(".py")
    folders = [Path.cwd(), *([Path(target).resolve().parent] if is_file else [])]
    with importable(folders), user_code(spec):
        module = load_file(Path(target), spec) if is_file else load_module(target, spec)
        return call(spec, find(module, name, spec, target), given, offered)


def call(spec: str, factory: Factory, given: Mapping[str, Any], offered: Mapping[str, Any]) -> object:
    """Call `factory` with `given` and with those of `offered` that it has a parameter for (`**kwargs` takes none).

    Raises: UsageError: the factory does not take a given argument, or needs one that nobody gave.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return factory(**given)
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [] if takes_any else [name for name in given if name not in named]
    if unknown:
        raise UsageError(f"{spec!r} takes no argument {unknown[0]!r}. It takes: {listing(named)}.")
    arguments = {**{k: v for k, v in offered.items() if k in named}, **given}
    for name in named:
        if name not in arguments and parameters[name].default is inspect.Parameter.empty:
            raise UsageError(f"{spec!r} needs the argument {name!r}: pass {how_to_pass(name)}.")
    return factory(**arguments)


def how_to_pass(name: str) -> str:
    """The option that sets a factory's argument."""
    own_options = {"classes": "--classes N", "input_shape": "--input-shape CxHxW"}
    return own_options.get(name, f"--model-arg {name}=VALUE")


def load_module(name: str, spec: str) -> ModuleType:
    """Import an installed module, or one in the current folder."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the module that was asked for (or a package on the way to it) is the user's slip of the pen;
        # anything else that is missing is a fault inside their code.
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(
                f"{spec!r}: no module {name!r} in the current folder or among the installed packages. "
                "Give package.module:factory or path/to/file.py:factory."
            ) from error
        raise
    except (TypeError, ValueError) as error:  # '', '.x': not a module name at all
        raise UsageError(f"{spec!r}: {name!r} is not a module name.") from error


def load_file(path: Path, spec: str) -> ModuleType:
    """Execute a Python file as a module of its own name, so that it hides no installed module."""
    if not path.is_file():
        raise UsageError(f"{spec!r}: no file {str(path)!r}. Give path/to/file.py:factory.")
    name = f"cahfp_factory_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"{spec!r}: {str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def find(module: ModuleType, name: str, spec: str, target: str) -> Factory:
    """The callable `name` of a module; the error says what is there instead."""
    factory = getattr(module, name, None)
    if callable(factory):
        return factory  # type: ignore[no-any-return]
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    problem = "is not callable" if hasattr(module, name) else "does not exist"
    raise UsageError(f"{spec!r}: {name!r} {problem} in {target!r}.{nearest(name, own)} It has: {listing(own)}.")


def nearest(name: str, known: list[str]) -> str:
    """' Did you mean ...?' with the nearest known names, or nothing."""
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def listing(names: list[str], most: int = 12) -> str:
    """Names for an error message, a dozen at most."""
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "") if names else "nothing"


@contextmanager
def importable(folders: list[Path]) -> Iterator[None]:
    """Let imports see `folders` first while the block runs."""
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def user_code(spec: str) -> Iterator[None]:
    """Turn whatever the user's code raises into an InputError with the last line of it."""
    try:
        yield
    except CahfpError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{spec!r} failed: {last_line(error)}\nRun it on its own to see where.") from error


def last_line(error: BaseException) -> str:
    """What Python prints on the last line of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
