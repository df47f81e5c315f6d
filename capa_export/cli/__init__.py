"""The command line. Heavy imports live inside the commands, so that `--help` answers at once."""

import gc
import os
import sys
import traceback
from functools import cache
from io import TextIOWrapper
from typing import Annotated

import typer
from typer.main import get_command

import capa_export
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.interrupts import Interruption, interruptible
from capa_export.base.progress import talk
from capa_export.cli.build import build, plan
from capa_export.cli.command import Command
from capa_export.cli.compare import compare
from capa_export.cli.evaluate import evaluate
from capa_export.cli.examples import epilog
from capa_export.cli.explain import explain
from capa_export.cli.plugins import plugins
from capa_export.cli.run import run
from capa_export.cli.show import doctor, inspect, models, selectors, targets
from capa_export.cli.stages import calibrate, engine, export, validate
from capa_export.cli.tune import tune

__all__ = ["app", "main"]

_SHOWN = 400
"""Characters of a path that an error repeats."""

app = typer.Typer(
    name="capa-export",
    help="Export vision-language models, pruned with CAPA, to ONNX and TensorRT.",
    epilog="Exit codes: 0 ok, 2 usage, 3 preflight, 4 export, 5 engine, 6 parity, 7 method, 130 or 143 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 160},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(capa_export.__version__)
        raise typer.Exit


for _command in (
    *(build, calibrate, export, engine, validate, compare, evaluate, explain, tune, run),
    *(inspect, plan, doctor, models, selectors, targets),
):
    app.command(cls=Command, epilog=epilog(_command.__name__))(_command)
app.add_typer(plugins, name="plugins")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the one place where an error becomes a line and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Threads that wait by spinning take several times as long on a machine that is busy otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What libraries make when they are imported stays: to look through all of it time and again takes half a second.
    gc.set_threshold(50_000)
    # Its warnings are about things that its own users do; what concerns ours is said by us.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal does not have is no reason to lose the rest of an answer.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    talk()
    with interruptible() as interruption:
        return _ended(arguments, interruption)


_parser = cache(get_command)


def _ended(arguments: list[str], interruption: Interruption) -> int:
    """The exit code of a command line."""
    try:
        words = [word for word in arguments if word != "--debug"]
        result = _parser(app)(words, standalone_mode=False, prog_name="capa-export")
        if result == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else ExitCode.OK
    except CapaError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        # A path that no system takes, or a file that went while it was read.
        if error.filename is None or "--debug" in arguments:
            raise
        print(f"error: {CapaError(f'{str(error.filename)[:_SHOWN]}: {error.strerror}')}", file=sys.stderr)
        return ExitCode.PREFLIGHT
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return interruption.code
    except typer.TyperException as error:
        error.show()  # pyright: ignore[reportAttributeAccessIssue]  # All that parsing raises have it.
        if "unexpected extra argument" in str(error) and "--image" in arguments:
            print("give --image once per picture", file=sys.stderr)
        elif "unexpected extra argument" in str(error) and {"--images", "--data", "-d"} & set(arguments):
            print("write a pattern in quotes, as --images 'photos/*.jpg'", file=sys.stderr)
        return ExitCode.USAGE
