"""`qcore mlflow`: bring journals to a tracking server that was away; and what verbs track of themselves."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore.cli import options as opt
from qcore.cli.output import print_json

if TYPE_CHECKING:
    from qcore.tracking.tracker import Tracker

app = typer.Typer(help="What reviewers see in MLflow.", no_args_is_help=True, rich_markup_mode=None)


@app.command("replay")
def replay(
    journal: Annotated[Path, typer.Option("--journal", help="Folder of journals that a run left.")],
    uri: Annotated[str, typer.Option("--uri", help="Tracking URI, e.g. http://127.0.0.1:5000 or sqlite:///mlflow.db.")],
    as_json: opt.AsJson = False,
) -> None:
    """Send everything that a run journaled; sending twice changes nothing."""
    from qcore.tracking.replay import replay as send

    sent = send(journal, uri, env=os.environ)
    if as_json:
        print_json({"parents": list(sent.parents), "url": sent.url, "journals": sent.journals, "lines": sent.lines})
    else:
        print(f"sent {sent.lines} lines of {sent.journals} journals; review: {sent.url}")


@contextlib.contextmanager
def tracked(uri: str | None, out: Path, run_name: str) -> Iterator["Tracker"]:
    """Yield the tracker of a verb; its journal lies beside `out` and is sent to `uri` when the block ends.

    Args:
        uri: MLflow tracking URI; None takes that of the environment, `none` or nothing there tracks nothing.
        out: what the verb writes.
        run_name: name of the run.
    """
    from qcore.tracking.tracker import Tracker
    from qcore.tracking.uploader import Uploader

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or uri == "none":
        with Tracker(None, env={}) as tracker:
            yield tracker
        return
    run_key = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
    folder = out.absolute().with_name(f"{out.name}.journal") / run_key
    own = {"QCORE_RUN_KEY": run_key, "QCORE_JOURNAL_DIR": str(folder)}
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI")}
    uploader = Uploader(folder, uri, os.environ)
    try:
        with Tracker(None, run_name=run_name, env={**kept, **own}) as tracker:
            yield tracker
    finally:
        for path in sorted(folder.glob("*.jsonl")):
            uploader.offer(path)
        uploaded = uploader.close()
        if uploaded.url:
            typer.echo(f"review: {uploaded.url}", err=True)
