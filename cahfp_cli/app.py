"""Typer wiring and exit codes; the work is in `commands/` and the packages under it."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cahfp_cli import __version__
from cahfp_cli.commands import doctor, evaluate, inspect, profile, prune, reconstruct, score, simulate, train
from cahfp_cli.commands.helping import Command, Group
from cahfp_cli.errors import CahfpError, UsageError
from cahfp_cli.output import LOG, prepare_streams, say


class Program(Group):
    """The whole command line; slips in what was typed, which Typer says itself, go to the log too."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "format_message"):  # click's, of whichever click this Typer has
                LOG.write("ERROR", f"error: {error.format_message()}")
            raise


app = typer.Typer(
    name="cahfp",
    cls=Program,
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


def open_log(ctx: typer.Context, path: Path | None) -> None:
    """Raises: UsageError: the file cannot be written."""
    if path is None or ctx.resilient_parsing:
        return
    try:
        LOG.open(path)
    except OSError as error:
        raise UsageError(f"--log {path}: {error.strerror}; name a file that can be written.") from error
    LOG.write("INFO", f"cahfp {__version__}: {' '.join(sys.argv[1:])}")


@app.callback(epilog="Exit codes: 0 done, 2 usage, 3 bad input, 4 budget cannot be met, 5 verification failed.")
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log",
            metavar="FILE",
            callback=open_log,
            help="Append what is said on standard error to this file, with time and level; goes before the command.",
        ),
    ] = None,
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
            say("interrupted: nothing was left half-written", "ERROR")
        raise
    except Exception as error:
        is_shown = os.environ.get("CAHFP_DEBUG") == "1"
        if is_shown or exit_code(error) == INTERNAL_ERROR:
            from traceback import format_exc  # costs a tenth of the time that help takes

            LOG.write("ERROR", format_exc())
        if is_shown:
            raise
        say(f"error: {explain(error)}", "ERROR")
        sys.exit(exit_code(error))
    finally:
        LOG.close()


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
