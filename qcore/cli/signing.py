"""The verbs of `qcore repo` about keys and signatures that come from several machines."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qcore.cli import options as opt
from qcore.cli.output import print_facts, print_json
from qcore.steps import repository as steps

Package = Annotated[Path | None, typer.Option("--package", help="The .qpkg that is released.")]
Evidence = Annotated[Path | None, typer.Option("--evidence", help="The gate's signed decision about it.")]
Provenance = Annotated[Path | None, typer.Option("--provenance", help="Signed provenance, if there is any.")]


class AgainstWhat(StrEnum):
    """What evaluations by a policy must compare with."""

    any = "any"
    served = "served"


def new_key(
    name: Annotated[str, typer.Argument(help="Its role: root1, root2, root3, gate, publisher, snapshot ...")],
    keys: opt.Keys,
    as_json: opt.AsJson = False,
) -> None:
    """Make one private key on this machine, NAME.pem, and NAME.pub, which may travel."""
    public = steps.new_key(name=name, keys=keys)
    facts = {"private key": str(public.with_suffix(".pem")), "public key": str(public)}
    print_json(facts) if as_json else print_facts("New key", facts)


def draft(
    out: opt.Out,
    root_key: Annotated[list[Path], typer.Option("--root-key", help="Public key of an offline key; three or more.")],
    key: Annotated[list[str] | None, typer.Option("--key", help="NAME=FILE.pub of an online key; repeatable.")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="Family known from the start.")] = None,
    repository: Annotated[
        str | None, typer.Option("--repository", help="Draft the next root of this one: its offline keys change.")
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="With --repository: folder of its pinned root.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write the first root and targets of a repository as a draft, from public keys alone; then `sign` it twice.

    With --repository: the next root, with other offline keys; two of the old and two of the new ones sign it.
    """
    if repository is None or keys is None:
        steps.draft_root(out=out, root_keys=root_key, online=key or (), families=family or ())
    else:
        steps.draft_next_root(out=out, root_keys=root_key, repository=repository, keys=keys)
    print_json({"draft": str(out)}) if as_json else print_facts("Draft for two offline keys", {"": str(out)})


def sign(
    file: Annotated[Path, typer.Option("--draft", help="Draft file; the signature is added to it.")],
    key: Annotated[list[Path], typer.Option("--key", help="Private key file of an offline key; repeatable.")],
    as_json: opt.AsJson = False,
) -> None:
    """Sign a draft with an offline key, on the machine where that key is."""
    signed = steps.sign_draft(file=file, keys=key)
    facts = {"draft": str(file), "signed by": ", ".join(k[:8] for k in signed.signed_by)}
    if as_json:
        print_json({"draft": str(file), "signed_by": list(signed.signed_by), "asked": list(signed.signers)})
    else:
        print_facts("Signed", facts)


def approve(
    repository: opt.Repository,
    keys: opt.Keys,
    family: opt.Family,
    policy: Annotated[list[Path] | None, typer.Option("--policy", help="Gate policy to approve; repeatable.")] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="Data card to approve; repeatable.")] = None,
    split: opt.EvaluationSplit = "evaluation",
    evidence: Annotated[
        Path | None, typer.Option("--evidence", help="Approve the policy and data of this decision; look at it first.")
    ] = None,
    against: Annotated[
        AgainstWhat, typer.Option("--against", help="served: evaluations must compare with what a channel serves.")
    ] = AgainstWhat.any,
    max_age: Annotated[
        int | None, typer.Option("--max-age", min=1, help="Days that evidence is good for; at first 30.")
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="In place of what was approved before.")] = False,
    draft_out: Annotated[
        Path | None, typer.Option("--draft", help="Write the change here, for offline keys on other machines.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Say with the offline keys which policies and evaluation data count for a family; makes the family known."""
    found = steps.approve(
        repository=repository,
        keys=keys,
        family=family,
        policy=policy or (),
        data=data or (),
        split=split,
        evidence=evidence,
        against=against.value,
        max_age_days=max_age,
        only=only,
        draft=draft_out,
    )
    if as_json:
        print_json({"family": family, "draft": str(draft_out) if draft_out else None, **found.to_json()})
    else:
        facts = {"policies": ", ".join(d[:12] for d in found.policies), "data": ", ".join(d[:12] for d in found.data)}
        print_facts(f"Draft for {family}" if draft_out else f"Approved for {family}", facts)


def propose(
    repository: opt.Repository,
    keys: opt.Keys,
    out: opt.Out,
    package: Package = None,
    evidence: Evidence = None,
    provenance: Provenance = None,
    family: Annotated[str | None, typer.Option("--family", help="Without a package: sign its role again.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write the next models role for a co-signer elsewhere; nothing is published."""
    files = {"package": package, "evidence": evidence, "provenance": provenance}
    steps.propose(repository=repository, keys=keys, out=out, family=family, **files)
    print_json({"proposal": str(out)}) if as_json else print_facts("Proposal", {"": str(out)})


def cosign(
    repository: opt.Repository,
    keys: opt.Keys,
    out: opt.Out,
    proposal: Annotated[Path | None, typer.Option("--proposal", help="Role file of `qcore repo propose`.")] = None,
    package: Package = None,
    evidence: Evidence = None,
    provenance: Provenance = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check a proposed role against package, evidence and approval, and sign it with the gate's key alone."""
    files = {"package": package, "evidence": evidence, "provenance": provenance}
    steps.cosign(repository=repository, keys=keys, out=out, proposal=proposal, **files)
    print_json({"cosigned": str(out)}) if as_json else print_facts("Co-signed", {"": str(out)})


def submit(
    repository: opt.Repository,
    keys: opt.Keys,
    file: Annotated[Path, typer.Option("--file", help="Signed draft, or co-signed refresh with --family.")],
    family: Annotated[str | None, typer.Option("--family", help="Whose role was co-signed.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Publish what was signed elsewhere: a draft of the offline keys, or a co-signed refresh."""
    done = steps.submit(repository=repository, keys=keys, file=file, family=family)
    print_json({"published": done}) if as_json else print(f"published: {done}")


def rotate(
    name: Annotated[str, typer.Argument(help="gate, publisher, channel-NAME, snapshot, timestamp or root.")],
    repository: opt.Repository,
    keys: opt.Keys,
    key: Annotated[Path | None, typer.Option("--key", help="The new key's file; default: one is made.")] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Snapshot, timestamp: drop the old key.")] = False,
    compromised: Annotated[
        bool, typer.Option("--compromised", help="The old key is in foreign hands: no overlap with it.")
    ] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Put a new key in the place of an old one; needs the root keys. Interrupted, run it again."""
    said = steps.rotate(repository=repository, keys=keys, name=name, key=key, finish=finish, compromised=compromised)
    print_json({"key": name, "done": said}) if as_json else print(said)
