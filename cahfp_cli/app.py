"""Typer wiring and exit codes; the work is in `commands/` and the packages under it."""

import os
import sys
from typing import Annotated

import typer

from cahfp_cli import __version__
from cahfp_cli.commands import doctor, evaluate, inspect, profile, prune, reconstruct, score, simulate, train
from cahfp_cli.commands.helping import Command, Group
from cahfp_cli.errors import CahfpError
from cahfp_cli.output import prepare_streams

app = typer.Typer(
    name="cahfp",
    cls=Group,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Prune one trained network for each device of a fleet, and merge what the devices trained.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(profile.app, name="profile")
app.command(cls=Command)(train.train)
app.command(cls=Command)(score.score)
app.command(cls=Command)(prune.prune)
app.command(cls=Command)(evaluate.evaluate)
app.command(cls=Command)(reconstruct.reconstruct)
app.command(cls=Command)(inspect.inspect)
app.command(cls=Command)(simulate.simulate)
app.command(cls=Command)(doctor.doctor)

INTERNAL_ERROR = 1
INTERRUPTED = 130


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cahfp {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 done, 2 usage, 3 bad input, 4 budget cannot be met, 5 verification failed.")
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; turn every error into one or two lines and its exit code."""
    prepare_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # as Typer ends on Ctrl-C
            sys.stderr.write("interrupted: nothing was left half-written\n")
        raise
    except Exception as error:
        if os.environ.get("CAHFP_DEBUG") == "1":
            raise
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(exit_code(error))


def exit_code(error: Exception) -> int:
    if isinstance(error, CahfpError):
        return error.exit_code
    return CahfpError.exit_code if isinstance(error, OSError | MemoryError) else INTERNAL_ERROR


def explain(error: Exception) -> str:
    if isinstance(error, CahfpError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input/output'}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller batch (--batch-size) or a machine with more memory"
    return f"internal error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(
        ": "
    ) + ("\nThis is a defect in cahfp: please report it with the output of the same command under CAHFP_DEBUG=1.")
