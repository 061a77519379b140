"""How help looks: arguments and options in groups, then examples and where to read on; the same under every typer.

Typer's own plain help knows no groups, writes types in place of metavars from 0.26 on, "\\[required]" below 0.21, and
forgets the help of arguments under click 8.5; so the lines are made here.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from cahfp_cli.commands.guides import GUIDES
from cahfp_cli.commands.options import GENERAL, PANELS

ARGUMENTS = "Arguments"


@dataclass(frozen=True)
class Entry:
    """An argument or option as it is shown. names: such as `-o, --output FILE`. notes: required, default, ..."""

    panel: str
    names: str
    help: str
    notes: tuple[str, ...]


class Command(TyperCommand):
    """A command with help in groups."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        helps = argument_helps(self.callback)
        for parameter in self.params:
            if not getattr(parameter, "help", None) and parameter.name in helps:
                parameter.help = helps[parameter.name]  # type: ignore[attr-defined]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(usage_of(p) for p in self.params if p.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_entries(entries(self.get_params(ctx)), formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        guide = GUIDES.get(name_of(ctx))
        if guide is not None:
            with formatter.section("Examples"):
                for example in guide.examples:
                    for line in example.splitlines():
                        formatter.write(f"  {line}\n")
            formatter.write(f"\nLearn more: {guide.page}\n")


class Group(TyperGroup):
    """A command with commands under it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help or "") for name, command in self.commands.items()])
        write_entries(entries(self.get_params(ctx)), formatter)


def name_of(ctx: Any) -> str:
    """`profile show`: the command's name without that of the program."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, ctx.info_name)
        ctx = ctx.parent
    return " ".join(names)


def entries(parameters: Iterable[Any]) -> list[Entry]:
    """What is shown of a command's parameters, in the order of the groups."""
    order = (ARGUMENTS, *PANELS)
    found = [entry_of(parameter) for parameter in parameters if not getattr(parameter, "hidden", False)]
    return sorted(found, key=lambda entry: order.index(entry.panel))


def entry_of(parameter: Any) -> Entry:
    is_argument = parameter.param_type_name == "argument"
    panel = ARGUMENTS if is_argument else getattr(parameter, "rich_help_panel", None) or GENERAL
    default = default_of(parameter)
    notes = (
        *(["required"] if parameter.required else []),
        *(["may be repeated"] if getattr(parameter, "multiple", False) else []),
        *([f"default: {default}"] if default is not None else []),
    )
    names = parameter.metavar if is_argument else names_of(parameter)
    return Entry(panel, names, parameter.help or "", notes)


def names_of(option: Any) -> str:
    """The names of an option, short ones first, with what it takes."""
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        return f"{names} / {', '.join(option.secondary_opts)}"
    return names if option.is_flag or not option.metavar else f"{names} {option.metavar}"


def default_of(parameter: Any) -> str | None:
    """An option's default as it would be typed; None where there is none, and of a flag that is off."""
    default = parameter.default
    if isinstance(default, bool):
        return parameter.opts[0] if default else None
    if isinstance(default, float):
        return f"{default:g}"
    return str(default) if isinstance(default, int | str) else None


def usage_of(argument: Any) -> str:
    return argument.metavar if argument.required else f"[{argument.metavar}]"


def write_entries(shown: list[Entry], formatter: Any) -> None:
    for panel in dict.fromkeys(entry.panel for entry in shown):
        rows = [
            (entry.names, entry.help + (f"  [{'; '.join(entry.notes)}]" if entry.notes else ""))
            for entry in shown
            if entry.panel == panel
        ]
        with formatter.section(panel):
            formatter.write_dl(rows)


def argument_helps(callback: Any) -> dict[str, str]:
    """The help of each argument of a command's function, by its name."""
    hints = get_type_hints(inspect.unwrap(callback), include_extras=True)
    return {
        name: one.help
        for name, hint in hints.items()
        for one in getattr(hint, "__metadata__", ())
        if isinstance(one, ArgumentInfo) and one.help
    }
