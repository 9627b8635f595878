"""`qcore gate`: decide and sign; check evidence offline; waive what failed, where the policy lets somebody."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from qcore import steps
from qcore.cli import options as opt
from qcore.cli.model import REFUSED, print_decision
from qcore.cli.output import print_facts, print_json, print_table

if TYPE_CHECKING:
    from qcore.steps import Verification

DECIDE = "decide"


class _Gate(TyperGroup):
    """The group whose options without a verb mean `decide`, since that is what a gate is asked for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] != "--help":
            args = [DECIDE, *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


app = typer.Typer(
    cls=_Gate,
    help="Decide whether a candidate may be released, and check such decisions. Options alone mean `decide`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Evidence = Annotated[Path, typer.Option("--evidence", help="Signed decision of `qcore gate`.")]


@app.command(DECIDE)
def gate(
    report: Annotated[Path, typer.Option("--report", help="Evaluation report of `qcore evaluate`.")],
    key: Annotated[Path, typer.Option("--key", help="Private key file of the gate, e.g. KEYS/gate.pem.")],
    out: opt.Out,
    policy: opt.Policy = None,
    package: Annotated[
        Path | None, typer.Option("--package", help="What shall be published; without it the decision is local only.")
    ] = None,
    parity: Annotated[Path | None, typer.Option(help="Report of `qcore parity` on the same model and split.")] = None,
    model: Annotated[Path | None, typer.Option(help="Refuse a report on another candidate.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Refuse a report against another baseline.")] = None,
    champion: Annotated[Path | None, typer.Option(help="Refuse a report against another champion.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data card: refuse a report on other samples.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the card; default: that of the report.")] = None,
    waiver: Annotated[
        list[Path] | None, typer.Option("--waiver", help="File of `qcore gate waive`; may be repeated.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Decide whether the candidate may be released, and sign the decision. Exit code 3 unless it passes."""
    decision = steps.gate(
        report=report,
        out=out,
        key=key,
        policy=policy,
        package=package,
        parity=parity,
        files=steps.MeasuredFiles(model=model, baseline=baseline, champion=champion, data=data, split=split),
        waivers=waiver or (),
    )
    if as_json:
        print_json({**decision.to_json(), "output": str(out), "who_may_override": decision.who_may_override()})
    else:
        print_decision(decision)
        if decision.package is None:
            print("local decision: it names no package and cannot be published; pass --package for that")
    if decision.outcome != "pass":
        raise typer.Exit(REFUSED)


@app.command("verify")
def verify(
    evidence: Evidence,
    key: Annotated[
        Path, typer.Option("--key", help="The gate's public key (KEYS/gate.pub), or a repository folder with --root.")
    ],
    root: Annotated[Path | None, typer.Option("--root", help="Trusted root.json, where --key is a repository.")] = None,
    package: Annotated[Path | None, typer.Option("--package", help="Package that devices download.")] = None,
    model: Annotated[Path | None, typer.Option("--model", help="ONNX file that was judged.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data card that it was judged on.")] = None,
    split: opt.EvaluationSplit = "evaluation",
    policy: Annotated[Path | None, typer.Option("--policy", help="Gate policy that it was judged by.")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Evaluation report; the decision is derived from it again.")
    ] = None,
    parity: Annotated[Path | None, typer.Option("--parity", help="Parity report that was judged.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check one evidence file offline. Exit code 1 unless it is genuine, 3 if it is but allows no release now."""
    found = steps.verify_gate(
        evidence=evidence,
        key=key,
        root=root,
        package=package,
        model=model,
        data=data,
        split=split,
        policy=policy,
        report=report,
        parity=parity,
    )
    if as_json:
        print_json(found.to_json())
    else:
        _print_verification(found)
    if not found.genuine:
        raise typer.Exit(1)
    if not found.releasable:
        raise typer.Exit(REFUSED)


@app.command("waive")
def waive(
    evidence: Evidence,
    check: Annotated[list[str], typer.Option("--check", help="Name of a check that did not pass; may be repeated.")],
    owner: Annotated[str, typer.Option("--owner", help="Who waives, by the name that the policy has.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, in one line; reviewers read it.")],
    days: Annotated[int, typer.Option("--days", help="How long it holds; the policy says how long at most.")],
    key: Annotated[Path, typer.Option("--key", help="Private key file of the owner.")],
    out: opt.Out,
    as_json: opt.AsJson = False,
) -> None:
    """Sign a waiver of failed checks, bound to exactly this decision; give it to `qcore gate --waiver`."""
    made = steps.waive(evidence=evidence, checks=check, owner=owner, reason=reason, days=days, key=key, out=out)
    if as_json:
        print_json({**made.to_json(), "output": str(out)})
    else:
        print_facts("Waiver", {"output": str(out), "says": made.sentence()})


@app.command("owner-key")
def owner_key(out: opt.Out, as_json: opt.AsJson = False) -> None:
    """Make a private key for somebody who may waive, and print the public one for `waivers.owners` of the policy."""
    public = steps.make_owner_key(out=out)
    if as_json:
        print_json({"output": str(out), "key": public})
    else:
        print_facts("Key of an owner", {"private key": str(out), "key in the policy": public})


def _print_verification(found: "Verification") -> None:
    print_table("Evidence", ("", "", "found"), [(f.what, f.state, f.detail) for f in found.findings])
    if found.decision is None:
        print("not genuine: nothing in this file can be believed")
        return
    print(found.decision.who_may_override())
    if not found.genuine:
        print("not genuine for these files: what does not fit is named above")
    elif found.decision.outcome != "pass":
        print(f"genuine; the gate did not pass: outcome {found.decision.outcome}")
    elif found.lapsed is not None:
        print(f"genuine, but no longer a pass: {found.lapsed}")
    else:
        print("genuine; the gate passed" + (" because of waivers" if found.decision.waivers else ""))
