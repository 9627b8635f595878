"""The verbs of `qcore repo` as a person or a script meets them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from simulators import FAMILY, World, make_world


def qcore(*arguments: object, code: int = 0) -> str:
    """Return stdout of one command line, which must end with `code`."""
    command = [sys.executable, "-P", "-m", "qcore", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path)
    world.publish("1.0.0")
    world.publish("1.1.0", seed=1)
    return world


@pytest.mark.slow
def test_a_release_is_audited_yanked_revoked_and_carried_away(world: World) -> None:
    place = ["--repository", world.store.folder, "--keys", world.keys.folder]
    target, old = (["--target", f"models/{FAMILY}/{v}.qpkg"] for v in ("1.1.0", "1.0.0"))
    audit = ["repo", "audit", "--repository", world.store.folder, "--root", world.keys.pinned_root]
    assert json.loads(qcore(*audit, *target, "--json"))["sound"] is True
    assert "sound: everything" in qcore(*audit, *target)
    bundle = world.folder / "b.tar"
    assert json.loads(qcore("repo", "export", *place, "--out", bundle, "--json"))["offers"] == [target[1]]
    yanked = json.loads(qcore("repo", "yank", *place, *target, "--to", old[1], "--json"))
    assert yanked["instead"] == {"stable": old[1]}
    assert "floor" in qcore("repo", "revoke", *place, *old)
    assert "revoked" in qcore(*audit, *old)
    assert "new key" in qcore("repo", "rotate", "publisher", *place)
    assert "old and new key are trusted" in qcore("repo", "rotate", "timestamp", *place)
    assert "only the new key" in qcore("repo", "rotate", "timestamp", *place, "--finish")
    rows = json.loads(qcore("repo", "status", "--repository", world.store.folder, "--json"))["roles"]
    assert {r["level"] for r in rows} == {"good"}
    package = next(world.store.folder.rglob("*.1.0.0.qpkg"))
    package.write_bytes(package.read_bytes() + b"x")
    assert "NOT sound" in qcore(*audit, *old, code=1)


def test_what_is_not_there_is_one_line(world: World) -> None:
    place = ["--repository", world.store.folder, "--keys", world.keys.folder]
    said = qcore("repo", "yank", *place, "--target", "models/digits/9.qpkg", code=1)
    assert "error: models/digits/9.qpkg is not published; published of digits: 1.0.0, 1.1.0" in said
    said = qcore("repo", "cosign", *place, "--out", world.folder / "x.json", code=1)
    assert "nothing to co-sign" in said
    said = qcore("repo", "rotate", "nothing", *place, code=1)
    assert said.count("\n") == 1
