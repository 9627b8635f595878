"""Trials are remembered across processes, also one that is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import conv_net, save, write_data

from qcore.errors import ConfigError
from qcore.trials import PACKAGE, remembered, source_sha256

SLOW = """
import sys, time
from pathlib import Path
from qcore.trials import remembered
folder = Path(sys.argv[1])

def run(k):
    with (folder / "ran.txt").open("a") as f:
        f.write(f"{k}\\n")
    time.sleep(0.05)
    return k * k

trial = remembered(folder / "journal.jsonl", "key", run)
print([trial(k) for k in range(12)])
"""


def counting(path, key="key"):
    ran = []

    def run(what):
        ran.append(what)
        return {"twice": what * 2}

    return remembered(path, key, run), ran


def test_a_trial_runs_once_per_key(tmp_path):
    path = tmp_path / "new" / "t.jsonl"
    trial, ran = counting(path)
    assert [trial(k) for k in (1, 2, 1)] == [{"twice": 2}, {"twice": 4}, {"twice": 2}]
    again, ran_again = counting(path)
    assert again(2) == {"twice": 4}
    other, ran_other = counting(path, "other")
    assert other(2) == {"twice": 4}
    assert (ran, ran_again, ran_other) == ([1, 2], [], [2])


@settings(deadline=None)
@given(st.integers(0, 200))
def test_a_journal_cut_anywhere_loses_at_most_the_trials_behind_the_cut(cut):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        trial, _ = counting(path)
        for k in range(4):
            trial(k)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) - min(cut, len(whole))])
        kept = path.read_bytes().count(b"\n")
        again, ran = counting(path)
        assert [again(k) for k in range(4)] == [{"twice": 2 * k} for k in range(4)]
        assert ran == list(range(kept, 4))
        assert path.read_bytes() == whole  # the torn line is gone, and the same trials give the same lines


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"key":"k","trial":1,"result":2}\nnonsense\n')
    with pytest.raises(ConfigError, match="line 2 is not a trial; delete the file"):
        remembered(path, "k", lambda x: x)


@pytest.mark.parametrize("changed", [b'"twice":3', b'"twice":NaN', b'"thrice":2', b'"twice":"2"'])
def test_a_line_that_says_something_else_than_was_written_is_refused(tmp_path, changed):
    path = tmp_path / "t.jsonl"
    counting(path)[0](1)
    path.write_bytes(path.read_bytes().replace(b'"twice":2', changed))
    with pytest.raises(ConfigError, match="line 1 was changed; delete the file to start over"):
        counting(path)


def test_lines_without_a_digest_are_trials_of_an_older_version(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"key":"key","trial":1,"result":{"twice":3}}\n')
    trial, ran = counting(path)
    assert trial(1) == {"twice": 2}
    assert ran == [1]


def test_after_kill_9_no_finished_trial_is_repeated(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    journal, ran = tmp_path / "journal.jsonl", tmp_path / "ran.txt"
    process = subprocess.Popen(command)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = journal.read_bytes().count(b"\n")
    assert finished < 12
    before = ran.read_text().split()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([k * k for k in range(12)])
    after = ran.read_text().split()[len(before) :]
    assert after == [str(k) for k in range(finished, 12)]


def test_edited_code_asks_its_trials_again_and_the_same_code_does_not(tmp_path):
    site, journal = tmp_path / "site", tmp_path / "s.json.trials.jsonl"
    shutil.copytree(PACKAGE, site / "qcore", ignore=shutil.ignore_patterns("__pycache__"))
    model, card = save(conv_net(), tmp_path / "m.onnx"), write_data(tmp_path, conv_net())
    command = [sys.executable, "-P", "-m", "qcore", "sensitivity", "--model", model, "--data", card]
    command += ["--target", "x86-vnni", "--samples", "4", "--out", tmp_path / "s.json"]

    def trials():
        subprocess.run(list(map(str, command)), env={**os.environ, "PYTHONPATH": str(site)}, check=True)
        return journal.read_bytes().splitlines()

    first = trials()
    assert first
    assert trials() == first
    (site / "qcore/numerics/affine.py").open("a").write("# the same numbers, as far as anybody can tell\n")
    again = trials()
    assert again[: len(first)] == first
    assert len(again) == 2 * len(first)


def test_the_digest_of_the_code_is_of_names_and_contents(tmp_path):
    digests = []
    for k, (name, text) in enumerate([("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("a.yaml", "2"), ("a.pyc", "2")]):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / name).write_text(text)
        digests.append(source_sha256(tmp_path / str(k)))
    assert len(set(digests)) == 5
    (tmp_path / "5").mkdir()
    assert source_sha256(tmp_path / "5") == digests[4]  # compiled files are no source
