"""The production ceremony of docs/keys.md, run command by command in folders that stand for machines."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import conv_net, save, write_data
from simulators import now

from qcore.cli.workspace import install_on_device
from qcore.release.store import DirectoryStore
from qcore.steps.auditing import audit

ROOT = Path(__file__).resolve().parents[3]
TRAVELS = re.compile(r".*\.pub|draft\.json|approval\.json|proposal\.json|cosigned\.json|root\.json|a\.qpkg|e\.json")
"""What people carry from machine to machine; never a `.pem`."""


def ceremony() -> list[tuple[str, list[str]]]:
    """Return the machine and the words of every command of the page, in order."""
    text = (ROOT / "docs" / "keys.md").read_text()
    blocks = re.findall(r"```sh ceremony (\w+)\n(.*?)```", text, re.DOTALL)
    return [(machine, shlex.split(line)) for machine, block in blocks for line in block.splitlines()]


def run(words: list[str], at: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words], cwd=at, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, (words, done.stderr)
    return done.stdout


def carry(folder: Path, machines: set[str]) -> None:
    """Bring what may travel to every machine, the newest copy of each file."""
    newest: dict[str, Path] = {}
    for path in (p for m in machines for p in (folder / m).iterdir() if TRAVELS.fullmatch(p.name)):
        if path.name not in newest or path.stat().st_mtime_ns > newest[path.name].stat().st_mtime_ns:
            newest[path.name] = path
    for name, source in newest.items():
        for machine in machines:
            if folder / machine / name != source:
                shutil.copy2(source, folder / machine / name)


@pytest.mark.slow
def test_the_ceremony_as_it_is_written_ends_with_a_model_on_a_device(tmp_path: Path) -> None:
    steps = ceremony()
    machines = {machine for machine, _ in steps}
    assert machines == {"root1", "root2", "root3", "gate", "publisher", "desk"}
    for machine in machines:
        (tmp_path / machine).mkdir()
    proto = conv_net()
    model, card = save(proto, tmp_path / "desk" / "m.onnx"), write_data(tmp_path / "desk", proto)
    shutil.copy(card, tmp_path / "desk" / "data.yaml") if card.name != "data.yaml" else None
    (tmp_path / "desk" / "policy.yaml").write_text("agreement: {min: 0.5}\n")
    made = False
    for machine, words in steps:
        if "a.qpkg" in words and not made:
            measure(tmp_path, model, card)
            made = True
        carry(tmp_path, machines)
        run(words, tmp_path / machine)
    repository, root = tmp_path / "repository", tmp_path / "desk" / "root.json"
    carry(tmp_path, machines)
    assert not [p for m in machines for p in (tmp_path / m).glob("*.pem") if m not in p.stem and m != "publisher"]
    assert DirectoryStore(folder=repository).get("metadata/timestamp.json") is not None
    done = install_on_device(
        tmp_path / "device", repository=repository, root=root, family="tiny", channel="stable", hardware="x86-vnni"
    )
    assert done.version == "1.0"
    assert audit(repository=repository, root=root, target="models/tiny/1.0.qpkg", now=now()).sound


def measure(folder: Path, model: Path, card: Path) -> None:
    """Make, measure and judge a package; the gate signs on its own machine."""
    desk, gate = folder / "desk", folder / "gate"
    made = ["--target", "x86-vnni", "--out", str(desk / "q.onnx")]
    run(["qcore", "compress", "--model", str(model), "--data", str(card), *made], desk)
    judged = ["--model", "q.onnx", "--baseline", str(model), "--data", str(card), "--out", "r.json"]
    run(["qcore", "evaluate", *judged], desk)
    named = ["--family", "tiny", "--version", "1.0", "--out", "a.qpkg"]
    run(["qcore", "package", "--model", "q.onnx", "--data", str(card), *named], desk)
    known = ["--report", "../desk/r.json", "--package", "../desk/a.qpkg", "--policy", "../desk/policy.yaml"]
    run(["qcore", "gate", *known, "--key", "gate.pem", "--out", "e.json"], gate)


def test_one_signature_makes_no_repository(tmp_path: Path) -> None:
    names = ("root1", "root2", "root3", "gate", "publisher", "snapshot", "timestamp", "channel-stable")
    for name in names:
        run(["qcore", "repo", "new-key", name, "--keys", "."], tmp_path)
    roots = [word for n in names[:3] for word in ("--root-key", f"{n}.pub")]
    online = [word for n in names[3:] for word in ("--key", f"{n}={n}.pub")]
    run(["qcore", "repo", "draft", *roots, *online, "--out", "d.json"], tmp_path)
    run(["qcore", "repo", "sign", "--draft", "d.json", "--key", "root2.pem"], tmp_path)
    run(["qcore", "repo", "sign", "--draft", "d.json", "--key", "gate.pem"], tmp_path, code=1)
    run(["qcore", "repo", "sign", "--draft", "d.json", "--key", "root2.pem"], tmp_path)  # again is no second one
    run(["qcore", "repo", "init", "--root", "d.json", "--repository", "r", "--keys", "."], tmp_path, code=1)
    assert not (tmp_path / "r" / "metadata").exists()
