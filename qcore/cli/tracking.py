"""`qcore mlflow`: bring journals to a tracking server that was away."""

import os
from pathlib import Path
from typing import Annotated

import typer

from qcore.cli import options as opt
from qcore.cli.output import print_json

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
