"""`qcore repo`: prove a store, make a signed repository in it, look at it, keep it fresh."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from qcore.cli import options as opt
from qcore.cli.output import print_facts, print_json, print_table
from qcore.cli.workspace import make_repository
from qcore.errors import ReleaseError

app = typer.Typer(help="The signed repository that devices read.", no_args_is_help=True, rich_markup_mode=None)


@app.command("init")
def init(
    repository: opt.Repository,
    keys: opt.Keys,
    channel: Annotated[list[str] | None, typer.Option("--channel", help="Channel to create; repeatable.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Make an empty repository and a set of development keys; again after an interruption, what is missing."""
    channels = channel or ["stable"]
    if not make_repository(repository, keys, channels):
        raise ReleaseError(f"{keys} and {repository} are complete already; nothing is overwritten; pass other folders")
    facts = {"repository": repository, "keys": str(keys), "root": str(keys / "root.json")}
    if as_json:
        print_json({**facts, "channels": channels})
    else:
        print_facts("Repository (development keys: not for production)", {**facts, "channels": ", ".join(channels)})


@app.command("import-key")
def import_key(
    uri: Annotated[str, typer.Argument(help="Where the key lies, e.g. awskms:alias/qcore-gate.")],
    name: Annotated[str, typer.Option("--name", help="Its role: gate, publisher, snapshot, channel-stable ...")],
    keys: opt.Keys,
    as_json: opt.AsJson = False,
) -> None:
    """Put a key of a key service into a key ring: its URI and public key, in NAME.signer.json."""
    from qcore.release.keys import import_signer

    path = import_signer(keys, name, uri)
    if as_json:
        print_json({"signer": str(path), "uri": uri})
    else:
        print_facts("Key in a service", {"signer": str(path), "uri": uri})


@app.command("status")
def status(repository: opt.Repository, as_json: opt.AsJson = False) -> None:
    """Show every role: version, what is left of its life, and how many keys must sign."""
    from qcore.release.location import open_store
    from qcore.release.repository import status as read_status

    rows = read_status(open_store(repository), now=datetime.now(UTC))
    if as_json:
        print_json({"roles": [r.to_json() for r in rows]})
        return
    print_table(
        f"Repository {repository}",
        ("role", "version", "expires", "left", "signatures"),
        [
            (r.role, str(r.version), f"{r.expires:%Y-%m-%d %H:%M}", _left(r.remaining), f"{r.threshold} of {r.keys}")
            for r in rows
        ],
    )


@app.command("refresh")
def refresh(repository: opt.Repository, keys: opt.Keys, as_json: opt.AsJson = False) -> None:
    """Sign again what nears its expiry; run it on a schedule."""
    from qcore.release.keys import load_keys
    from qcore.release.location import open_store
    from qcore.release.repository import refresh as sign_again

    roles = sign_again(open_store(repository), load_keys(keys), now=datetime.now(UTC))
    if as_json:
        print_json({"signed": list(roles)})
    else:
        print(f"signed again: {', '.join(roles) or 'nothing was due'}")


@app.command("doctor")
def doctor(repository: opt.Repository, as_json: opt.AsJson = False) -> None:
    """Prove that a store keeps its conditions (create-only, compare-and-swap, races); exit code 1 if it does not.

    Writes objects of its own beside the repository and removes them; the repository is not touched.
    """
    from qcore.release.doctor import examine, refuse_unproven
    from qcore.release.location import open_store

    probes = examine(open_store(repository))
    if as_json:
        print_json({"repository": repository, "ok": all(p.ok for p in probes), "probes": [p.to_json() for p in probes]})
    else:
        rows = [(p.name, "yes" if p.ok else "NO", p.expected, p.observed) for p in probes]
        print_table(f"Store {repository}", ("probe", "good", "expected", "observed"), rows)
    refuse_unproven(probes)


def _left(remaining: object) -> str:
    seconds = int(getattr(remaining, "total_seconds")())  # noqa: B009 - a timedelta, typed by its owner
    if seconds <= 0:
        return "expired"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
