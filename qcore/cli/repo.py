"""`qcore repo`: prove a store, make a signed repository in it, look at it, keep it fresh, take releases back."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore.cli import options as opt
from qcore.cli import signing
from qcore.cli.output import print_facts, print_json, print_table, size
from qcore.cli.workspace import make_repository
from qcore.errors import ReleaseError
from qcore.steps import repository as steps

if TYPE_CHECKING:
    from qcore.release.withdrawal import Withdrawal

app = typer.Typer(help="The signed repository that devices read.", no_args_is_help=True, rich_markup_mode=None)
app.command("new-key")(signing.new_key)
app.command("draft")(signing.draft)
app.command("sign")(signing.sign)
app.command("approve")(signing.approve)
app.command("propose")(signing.propose)
app.command("cosign")(signing.cosign)
app.command("submit")(signing.submit)
app.command("rotate")(signing.rotate)

WARNINGS = {"good": "", "half": "half its life is gone", "quarter": "SIGN AGAIN NOW", "expired": "EXPIRED"}
ReleaseTarget = Annotated[str, typer.Option("--target", help="The release: models/FAMILY/VERSION.qpkg.")]


@app.command("init")
def init(
    repository: opt.Repository,
    keys: opt.Keys,
    channel: Annotated[list[str] | None, typer.Option("--channel", help="Channel to create; repeatable.")] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Draft that the offline keys signed; --keys then holds online keys.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Make an empty repository and a set of development keys; again after an interruption, what is missing.

    With --root: the production ceremony of docs/keys.md; no key is made.
    """
    if root is not None:
        pinned = steps.init_signed(repository=repository, keys=keys, draft=root)
        facts = {"repository": str(repository), "root": str(pinned)}
        print_json(facts) if as_json else print_facts("Repository", facts)
        return
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
    """Show every role: version, what is left of its life, and how many keys must sign.

    A role with less than half of its life left is marked, with less than a quarter loudly: `refresh` does not run.
    """
    from qcore.release.location import open_store
    from qcore.release.repository import status as read_status

    rows = read_status(open_store(repository), now=datetime.now(UTC))
    if as_json:
        print_json({"roles": [r.to_json() for r in rows]})
        return
    print_table(
        f"Repository {repository}",
        ("role", "version", "expires", "left", "signatures", "warning"),
        [
            (
                r.role,
                str(r.version),
                f"{r.expires:%Y-%m-%d %H:%M}",
                _left(r.remaining),
                f"{r.threshold} of {r.keys}",
                WARNINGS[r.level],
            )
            for r in rows
        ],
    )


@app.command("refresh")
def refresh(repository: opt.Repository, keys: opt.Keys, as_json: opt.AsJson = False) -> None:
    """Sign again what nears its expiry; run it on a schedule."""
    roles = steps.refresh(repository=repository, keys=keys)
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


@app.command("yank")
def yank(
    repository: opt.Repository,
    keys: opt.Keys,
    target: ReleaseTarget,
    channel: Annotated[list[str] | None, typer.Option("--channel", help="From which; default: all held.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="Older release that devices shall go back to.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Take a release out of channels: nobody new gets it; who has it keeps it, or goes back with --to."""
    _print(steps.yank(repository=repository, keys=keys, target=target, channels=channel or (), to=to), as_json)


@app.command("revoke")
def revoke(repository: opt.Repository, keys: opt.Keys, target: ReleaseTarget, as_json: opt.AsJson = False) -> None:
    """Forbid a release and all before it to every device, for ever: raises the security floor above it."""
    _print(steps.revoke(repository=repository, keys=keys, target=target), as_json)


@app.command("audit")
def audit(
    repository: opt.Repository,
    target: ReleaseTarget,
    root: Annotated[Path, typer.Option("--root", help="The pinned root.json; the repository's own proves nothing.")],
    tracking: Annotated[str | None, typer.Option("--tracking", help="MLflow URI to compare with.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Tell a release's story again: bytes, evidence, approval, signatures, records. Exit code 1 if anything is off."""
    from qcore.steps.auditing import audit as tell

    found = tell(repository=repository, root=root, target=target, tracking=tracking)
    if as_json:
        print_json(found.to_json())
    else:
        print_table(f"Audit of {target}", ("", "", "found"), [(f.what, f.state, f.detail) for f in found.findings])
        print("sound: everything that was checked fits" if found.sound else "NOT sound: see what does not fit")
    if not found.sound:
        raise typer.Exit(1)


@app.command("export")
def export(
    repository: opt.Repository,
    keys: opt.Keys,
    out: opt.Out,
    family: Annotated[str | None, typer.Option("--family", help="Only this one.")] = None,
    channel: Annotated[str | None, typer.Option("--channel", help="Only this one.")] = None,
    days: Annotated[
        int | None, typer.Option("--days", help="Sign it to count so long (up to 30); needs the online keys.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write what channels offer into one file, for devices without a network: `qcore-device install --bundle`."""
    done = steps.export(repository=repository, keys=keys, out=out, family=family, channel=channel, days=days)
    if as_json:
        print_json(done.to_json())
    else:
        facts = {"bundle": done.path, "offers": ", ".join(done.offers), "size": size(done.size_bytes)}
        print_facts("Bundle", {**facts, "devices take it until": done.expires})


def _print(done: "Withdrawal", as_json: bool) -> None:
    if as_json:
        print_json(done.to_json())
        return
    instead = ", ".join(f"{c}: {r or 'nothing'}" for c, r in done.instead.items())
    facts = {"release": done.release, "yanked from": ", ".join(done.channels) or "no channel"}
    print_facts("Taken back", {**facts, "offered now": instead, "floor": str(done.floor)})


def _left(remaining: timedelta) -> str:
    seconds = int(remaining.total_seconds())
    if seconds <= 0:
        return "expired"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
