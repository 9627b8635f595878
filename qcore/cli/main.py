"""`qcore`: the verbs, and the one place where an error becomes a line and an exit code.

Exit codes: 0 done, 1 error (one line), 2 usage (one line), 3 the gate did not pass or a budget does not hold,
130 interrupted.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from qcore import __version__
from qcore.cli import (
    calibration,
    demo,
    evaluation,
    gate,
    layers,
    lint,
    model,
    parity,
    pipeline,
    repo,
    review,
    tracking,
    training,
)
from qcore.cli.output import print_json
from qcore.errors import QcoreError
from qcore.steps import is_first

INTERRUPTED = 130

app = typer.Typer(
    name="qcore",
    help="Compress an ONNX model, prove that it is still good, and ship exactly those bytes to devices.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("calibrate")(calibration.calibrate)
app.command("merge-tables")(calibration.merge_tables)
app.command("quantize")(model.quantize)
app.command("finetune")(training.finetune)
app.command("prune")(model.prune)
app.command("cluster")(model.cluster)
app.command("decompose")(model.decompose)
app.command("compress")(model.compress)
app.command("lint")(lint.lint)
app.command("evaluate")(evaluation.evaluate)
app.command("merge-reports")(evaluation.merge_reports)
app.command("parity")(parity.parity)
app.command("review")(review.review)
app.command("layers")(layers.layers)
app.command("sensitivity")(layers.sensitivity)
app.command("mixed")(layers.mixed)
app.command("package")(model.package)
app.command("provenance")(model.provenance)
app.command("publish")(model.publish)
app.command("demo")(demo.demo)
app.add_typer(gate.app, name="gate")
app.add_typer(repo.app, name="repo")
app.add_typer(pipeline.app, name="pipeline")
app.add_typer(tracking.app, name="mlflow")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qcore {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    del version


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every expected failure is one line on stderr.

    With `--json` the same line is also the one object on stdout: `{"error": ...}`.
    """
    code, problem = _run(arguments)
    if problem:
        line = " ".join(problem.split())
        print(f"error: {line}", file=sys.stderr)
        if "--json" in arguments and is_first():
            print_json({"error": line})
    return code


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """Return the exit code, and what went wrong in words."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=list(arguments), prog_name="qcore", standalone_mode=False)
    except TyperException as e:
        return _usage(e)
    except QcoreError as e:
        return 1, str(e)
    except typer.Exit as e:
        result = e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        result = INTERRUPTED
    except BrokenPipeError:
        return 0, ""  # the reader of the output left; that is its right
    except ModuleNotFoundError:
        raise  # the entry point names the extra that brings it
    except OSError as e:
        where = f" {e.filename}" if e.filename else ""
        return 1, f"{e.strerror or e}{where}; check the path, its permissions and the free space"
    except Exception as e:  # noqa: BLE001 - the one boundary: a person sees a line, never a traceback
        return 1, f"unexpected {type(e).__name__}: {e}; this is a defect of qcore: report it with the command"
    if result == INTERRUPTED:
        return INTERRUPTED, "interrupted; nothing half-written is left; run the same command again"
    return (result, "") if isinstance(result, int) else (0, "")


def _usage(error: TyperException) -> tuple[int, str]:
    """Return 2 and a usage problem in words; no arguments at all is a request for help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(str(error))
        return 2, ""
    context = getattr(error, "ctx", None)
    verb = context.command_path if context is not None else "qcore"
    message = getattr(error, "format_message", error.__str__)()
    return int(getattr(error, "exit_code", 2)), f"{message.rstrip('.')}; see `{verb} --help`"


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))
