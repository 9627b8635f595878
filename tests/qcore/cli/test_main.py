"""The command line as a person or a script meets it: in a process of its own."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from channelled import grown
from models import conv_net, save, write_data

from qcore.cli.pipeline import family_name


def qcore(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-P", "-m", "qcore", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    proto = conv_net()
    return save(proto, folder / "m.onnx"), write_data(folder, proto)


def test_the_verbs_make_one_path(files, tmp_path, location):
    model, card = files

    def run(*arguments, code=0):
        done = qcore(*arguments, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)  # one object and nothing else

    assert run("repo", "doctor", "--repository", location)["ok"] is True
    run("repo", "init", "--repository", location, "--keys", tmp_path / "keys")
    table = run("calibrate", "--model", model, "--data", card, "--out", tmp_path / "t.json")
    assert table["samples"] == 40
    made = run("quantize", "--model", model, "--table", tmp_path / "t.json", "--out", tmp_path / "q.onnx")
    assert made["size_bytes"] == (tmp_path / "q.onnx").stat().st_size
    assert made["steps"][-1]["skipped"] == []
    report = run(
        "evaluate", "--model", tmp_path / "q.onnx", "--baseline", model, "--data", card, "--out", tmp_path / "r.json"
    )
    assert report["model"]["sha256"] == made["model"]["sha256"]
    (tmp_path / "p.yaml").write_text("agreement: {min: 0.5}\n")
    gate = [
        "gate",
        "--report",
        tmp_path / "r.json",
        "--key",
        tmp_path / "keys" / "gate.pem",
        "--out",
        tmp_path / "e.json",
    ]
    names = ["--family", "tiny", "--version", "1.0"]
    run("package", "--model", tmp_path / "q.onnx", "--data", card, *names, "--out", tmp_path / "a.qpkg")
    shipped = ["--package", tmp_path / "a.qpkg"]
    assert run(*gate, "--policy", tmp_path / "p.yaml", *shipped)["outcome"] == "pass"
    proof = ["--evidence", tmp_path / "e.json"]
    known = ["--report", tmp_path / "r.json", "--policy", tmp_path / "p.yaml", "--data", card]
    verified = run("gate", "verify", *proof, "--key", tmp_path / "keys" / "gate.pub", *shipped, *known)
    assert (verified["genuine"], verified["releasable"], verified["outcome"]) == (True, True, "pass")
    where = ["--repository", location, "--keys", tmp_path / "keys"]
    release = run("publish", "--package", tmp_path / "a.qpkg", *proof, *where)
    assert (release["family"], release["version"], release["channel"]) == ("tiny", "1.0", "stable")
    assert len(run("repo", "status", "--repository", location)["roles"]) >= 5
    assert "signed" in run("repo", "refresh", *where)


def test_a_gate_that_says_no_exits_with_3(files, tmp_path):
    model, card = files
    assert qcore("repo", "init", "--repository", tmp_path / "r", "--keys", tmp_path / "k").returncode == 0
    made = ["--model", model, "--data", card, "--recipe", "int2-weights", "--out", tmp_path / "q.onnx"]
    assert qcore("compress", *made).returncode == 0
    judged = ["--model", tmp_path / "q.onnx", "--baseline", model, "--data", card, "--out", tmp_path / "r.json"]
    assert qcore("evaluate", *judged).returncode == 0
    gate = ["--report", tmp_path / "r.json", "--key", tmp_path / "k" / "gate.pem", "--out", tmp_path / "e.json"]
    done = qcore("gate", *gate)
    assert done.returncode == 3
    assert "outcome: fail (" in done.stdout


def complaint(done, code):
    """Return the one line on stderr of a command that failed as it should."""
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert done.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def test_with_json_an_error_is_an_object_too(tmp_path):
    done = qcore("calibrate", "--model", "no.onnx", "--data", "d.yaml", "--out", tmp_path / "t", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"error": done.stderr.strip().removeprefix("error: ")}


BLOCKED = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # as if it were not installed
from qcore.__main__ import main
main()
"""


def without(packages, *arguments):
    command = [sys.executable, "-P", "-c", BLOCKED, ",".join(packages), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compression_needs_neither_release_nor_pipeline_packages(files, tmp_path):
    absent = ("tuf", "securesystemslib", "zstandard", "kfp", "mlflow", "sklearn")
    assert without(absent, "--help").returncode == 0
    done = without(absent, "compress", "--model", files[0], "--data", files[1], "--out", tmp_path / "q.onnx")
    assert done.returncode == 0, done.stderr
    done = without(absent, "repo", "init", "--repository", tmp_path / "r", "--keys", tmp_path / "k")
    assert "error: package securesystemslib is not installed" in complaint(done, 1)
    assert "pip install 'kfp-qcore[release]'" in done.stderr


def test_a_missing_command_line_package_is_one_line():
    assert "'kfp-qcore[cli]'" in complaint(without(("typer",), "--help"), 1)


def test_an_interrupt_is_one_line(files, tmp_path):
    np.savez(tmp_path / "big.npz", x=np.zeros((60_000, 3, 8, 8), np.float32), y=np.arange(60_000) % 2)
    (tmp_path / "big.yaml").write_text("name: big\npath: big.npz\nsplits: {calibration: {}}\n")
    command = ["calibrate", "--model", files[0], "--data", tmp_path / "big.yaml", "--out", tmp_path / "t.json"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "qcore", *map(str, command)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("calibrating")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.splitlines()[-1].startswith("error: interrupted; nothing half-written is left")
    assert not (tmp_path / "t.json").exists()


def test_compress_asks_for_data_only_where_it_calibrates(files, tmp_path):
    model, _ = files
    done = qcore("compress", "--model", model, "--out", tmp_path / "c.onnx")
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (1, "", [])
    assert "recipe int8 calibrates and got no data" in " ".join(done.stderr.split())
    done = qcore("compress", "--model", model, "--out", tmp_path / "c.onnx", "--recipe", "float16", "--json")
    assert done.returncode == 0, done.stderr
    assert [s["method"] for s in json.loads(done.stdout)["steps"]] == ["float16"]


def test_a_missing_file(files, tmp_path):
    line = complaint(qcore("calibrate", "--model", "no.onnx", "--data", files[1], "--out", tmp_path / "t"), 1)
    assert "no.onnx does not exist; check the path" in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model(files, tmp_path):
    (tmp_path / "m.onnx").write_text("hello")
    done = qcore("compress", "--model", tmp_path / "m.onnx", "--data", files[1], "--out", tmp_path / "q.onnx")
    assert "not" in complaint(done, 1)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.zeros((60, 1, 28, 28), np.float32), "samples have shape (1, 28, 28); input 'x'"),
        (np.full((60, 3, 8, 8), np.nan, np.float32), "sample 0 of t (t.npz) holds NaN"),
    ],
)
def test_data_that_does_not_fit(files, tmp_path, x, says):
    np.savez(tmp_path / "t.npz", x=x, y=np.zeros(60, int))
    (tmp_path / "t.yaml").write_text("name: t\npath: t.npz\nsplits: {calibration: {}}\n")
    done = qcore("calibrate", "--model", files[0], "--data", tmp_path / "t.yaml", "--out", tmp_path / "t.json")
    assert says in complaint(done, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.npz", "t.yaml"]


def test_a_misspelt_option_and_verb_are_usage_errors():
    line = complaint(qcore("compress", "--modle", "m.onnx"), 2)
    assert "--modle" in line
    assert "--model" in line
    assert "see `qcore compress --help`" in line
    assert "compress" in complaint(qcore("compres"), 2)
    assert "--model" in complaint(qcore("compress", "--data", "d"), 2)


def test_a_misspelt_field_in_a_policy(files, tmp_path):
    (tmp_path / "p.yaml").write_text("top1: {max_dorp: 0.01}\n")
    gate = ["--report", tmp_path / "r.json", "--key", tmp_path / "k.pem", "--out", tmp_path / "e.json"]
    (tmp_path / "r.json").write_text("{}")
    assert "schema qcore.evaluation/3" in complaint(qcore("gate", *gate, "--policy", tmp_path / "p.yaml"), 1)


def test_help_and_version_cost_nothing_and_succeed():
    assert qcore("--version").stdout.startswith("qcore ")
    done = qcore("--help")
    assert done.returncode == 0
    assert "compress" in done.stdout


@pytest.mark.parametrize(
    ("file", "name"),
    [("efficientnet_lite0.onnx", "efficientnet_lite0"), ("My Model (v2).onnx", "my-model-v2"), ("é.onnx", "model")],
)
def test_family_names_come_from_the_file(tmp_path, file, name):
    assert family_name(tmp_path / file) == name


def test_an_interrupted_repo_init_can_be_run_again(tmp_path):
    where = ["--repository", tmp_path / "r", "--keys", tmp_path / "k"]
    assert qcore("repo", "init", *where).returncode == 0
    (tmp_path / "r" / "metadata" / "timestamp.json").unlink()  # as after a kill before the last write
    assert qcore("repo", "init", *where).returncode == 0
    assert qcore("repo", "status", "--repository", tmp_path / "r").returncode == 0
    assert "complete already" in complaint(qcore("repo", "init", *where), 1)


@pytest.mark.parametrize(("option", "value"), [("--family", "../x"), ("--version", "1/2"), ("--channel", "beta")])
def test_a_pipeline_refuses_wrong_names_before_it_runs(files, tmp_path, option, value):
    prepared = ["--repository", tmp_path / "r", "--keys", tmp_path / "k"]
    assert qcore("repo", "init", *prepared).returncode == 0
    run = ["pipeline", "run", "--model", files[0], "--data", files[1], "--workspace", tmp_path / "w", *prepared]
    assert value in complaint(qcore(*run, option, value), 1)
    assert not (tmp_path / "w" / "runs").exists()


def test_prune_removes_channels_where_a_budget_is_given(files, tmp_path):
    model, card = files
    budget = ["prune", "--model", model, "--out", tmp_path / "o.onnx", "--macs", "0.6"]
    done = qcore(*budget, "--data", card)
    assert done.returncode == 1
    assert "the budget cannot be reached: with the fewest channels allowed" in done.stderr
    for more, says in (
        ([], "removing channels measures what is lost and got no data; pass --data CARD"),
        (
            ["--data", card, "--sparsity", "0.5"],
            "--sparsity and --pattern zero weights, --macs, --size and --latency remove",
        ),
        (["--data", card, "--size", "0.01"], "of size is left, wanted 0.01; raise size"),
    ):
        done = qcore(*budget, *more)
        assert done.returncode == 1
        assert says in done.stderr
    assert not (tmp_path / "o.onnx").exists()


def test_prune_says_what_became_smaller(tmp_path):
    proto = grown(0, ["residual", "separable"], "pooled", width=32)
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path / "data", proto)
    done = qcore("prune", "--model", model, "--data", card, "--out", tmp_path / "o.onnx", "--macs", "0.6")
    assert done.returncode == 0, done.stderr
    assert "Smaller" in done.stdout
    assert "channels" in done.stdout
    assert (tmp_path / "o.onnx").stat().st_size < model.stat().st_size


def test_a_waiver_from_the_policy_to_the_repository(files, tmp_path):
    model, card = files

    def run(*arguments, code=0):
        done = qcore(*arguments, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    where = ["--repository", tmp_path / "repo", "--keys", tmp_path / "keys"]
    run("repo", "init", *where)
    key = run("gate", "owner-key", "--out", tmp_path / "ada.pem")["key"]
    (tmp_path / "p.yaml").write_text(
        "agreement: {min: 0.5}\nbudgets: {size_ratio: 0.01}\n"
        f"waivers: {{owners: [{{name: Ada, key: {key}}}], checks: [size_ratio], max_days: 5}}\n"
    )
    made, shipped = ["--model", tmp_path / "q.onnx"], ["--package", tmp_path / "x.qpkg"]
    run("compress", "--model", model, "--data", card, "--recipe", "int8", "--out", tmp_path / "q.onnx")
    run("evaluate", *made, "--baseline", model, "--data", card, "--out", tmp_path / "r.json")
    run("package", *made, "--data", card, "--family", "f", "--version", "1", "--out", tmp_path / "x.qpkg")
    gate = ["gate", "--report", tmp_path / "r.json", *shipped, "--policy", tmp_path / "p.yaml"]
    gate += ["--key", tmp_path / "keys" / "gate.pem"]
    failed, waived, waiver = (tmp_path / f"{name}.json" for name in ("failed", "waived", "waiver"))
    assert run(*gate, "--out", failed, code=3)["outcome"] == "fail"
    verify = ["gate", "verify", "--key", tmp_path / "keys" / "gate.pub", *shipped]
    assert run(*verify, "--evidence", failed, code=3)["genuine"]
    asked = ["--evidence", failed, "--check", "size_ratio", "--owner", "Ada", "--reason", "launch", "--days"]
    refused = qcore("gate", "waive", *asked, "6", "--key", tmp_path / "ada.pem", "--out", waiver)
    assert "the policy allows 5" in complaint(refused, 1)
    run("gate", "waive", *asked, "5", "--key", tmp_path / "ada.pem", "--out", waiver)
    done = qcore(*gate, "--waiver", waiver, "--out", waived)
    assert done.returncode == 0, done.stderr
    assert "fail, waived" in done.stdout
    assert "outcome: pass by waiver of size_ratio" in done.stdout
    assert "Ada waived size_ratio until" in done.stdout
    assert run(*verify, "--evidence", waived)["releasable"]
    assert run("publish", *shipped, "--evidence", waived, *where)["version"] == "1"
    other = qcore(*verify, "--evidence", waived, "--model", model)
    assert other.returncode == 1
    assert "does not fit" in other.stdout


def test_the_gate_takes_options_or_a_verb():
    assert "--report" in complaint(qcore("gate", "--key", "k", "--out", "o"), 2)
    assert "see `qcore gate verify --help`" in complaint(qcore("gate", "verify", "--evidence", "e"), 2)
    done = qcore("gate", "--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("decide", "verify", "waive", "owner-key"))
