"""Commands whose help reads the same under every typer and click that may be installed.

Flower asks for typer below 0.21. Under it, plain help shows "\\[required]" where rich is installed; and click from 8.5
on forgets the help of arguments, or lists them twice.
"""

import inspect
from typing import Any, get_type_hints

from typer.core import TyperCommand
from typer.models import ArgumentInfo


class Command(TyperCommand):
    """A command that shows the help of its arguments, once, and no escapes that are meant for rich."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        helps = argument_helps(self.callback)
        for parameter in self.params:
            if not getattr(parameter, "help", None) and parameter.name in helps:
                parameter.help = helps[parameter.name]  # type: ignore[attr-defined]

    def format_arguments(self, ctx: Any, formatter: Any) -> None:
        """Click's own list of arguments: nothing, since typer lists them with the options."""

    def get_help(self, ctx: Any) -> str:
        return super().get_help(ctx).replace("\\[", "[")


def argument_helps(callback: Any) -> dict[str, str]:
    """The help of each argument of a command's function, by its name."""
    hints = get_type_hints(inspect.unwrap(callback), include_extras=True)
    return {
        name: one.help
        for name, hint in hints.items()
        for one in getattr(hint, "__metadata__", ())
        if isinstance(one, ArgumentInfo) and one.help
    }
