"""`recipe: auto` on files: the first recipe that passes, or the nearest one and the reason why none does."""

import json
import os
import signal
import subprocess
import sys
import time

import onnx
import pytest
from models import conv_net, save, write_data
from recovering import outlier_net

from qcore import compression, steps
from qcore.canonical import sha256_json
from qcore.cli.main import run
from qcore.errors import ConfigError
from qcore.files import sha256_file
from qcore.steps import calibration, judgement

NPU = "npu-int8-symmetric"
EASY, IMPOSSIBLE = "agreement: {min: 0.5}\n", "output_sqnr_db: 250\n"


@pytest.fixture
def inputs(tmp_path):
    """A model and data in a folder of their own, which must look the same afterwards."""
    folder = tmp_path / "in"
    folder.mkdir()
    proto = conv_net()
    model, card = save(proto, folder / "m.onnx"), write_data(folder, proto)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    yield model, card
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def policy(folder, text):
    path = folder / "policy.yaml"
    path.write_text(text)
    return path


def test_the_first_pass_is_written(inputs, tmp_path):
    model, card = inputs
    result = steps.compress_auto(
        model=model, data=card, out=tmp_path / "q.onnx", target="x86-avx2", policy=policy(tmp_path, EASY)
    )
    assert result.judged_on == "evaluation"
    assert [a.outcome for a in result.climb.attempts] == ["pass"]
    assert result.climb.why.startswith("auto-per-tensor is the first that passes the gate's policy (agreement")
    assert result.written.sha256 == sha256_file(tmp_path / "q.onnx")
    assert result.written.recipe == "auto-per-tensor"
    assert result.written.size_bytes == result.climb.attempts[0].size_bytes
    onnx.checker.check_model(onnx.load(tmp_path / "q.onnx"), full_check=True)
    again = steps.compress_auto(
        model=model, data=card, out=tmp_path / "r.onnx", target="x86-avx2", policy=policy(tmp_path, EASY)
    )
    assert again.written.sha256 == result.written.sha256
    assert again.climb == result.climb


@pytest.mark.slow
def test_a_policy_that_nothing_satisfies_ends_with_the_nearest_and_says_why(tmp_path):
    proto = outlier_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto, n=80)
    card.write_text(card.read_text().replace("[40, 240]", "[40, 80]"))
    result = steps.compress_auto(
        model=model, data=card, out=tmp_path / "q.onnx", target=NPU, policy=policy(tmp_path, IMPOSSIBLE)
    )
    attempts = result.climb.attempts
    assert all((a.outcome, a.obstacle) == ("fail", "model") for a in attempts)
    tried = ("per-tensor", "min-max", "correct-bias", "equalize", "round-weights")
    assert [a.recipe for a in attempts] == [f"auto-{name}" for name in tried]
    assert not result.mixed.search.met  # 16-bit activations were tried last, and do not do either
    assert attempts[result.climb.chosen].error == min(a.error for a in attempts)
    assert result.written.recipe == attempts[result.climb.chosen].recipe
    assert result.written.sha256 == sha256_file(tmp_path / "q.onnx")
    assert result.climb.why.startswith(f"no recipe passes; {result.written.recipe} is nearest to float (held-out error")
    assert "; mixed precision: the gate's policy does not hold with all layers promoted" in result.climb.why
    assert result.climb.why.endswith("exhausted: hand over to training: qcore finetune --method qat")


@pytest.mark.slow
def test_where_int8_is_at_fault_some_layers_get_more_bits_and_pass(tmp_path):
    proto = outlier_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto, n=80)
    card.write_text(card.read_text().replace("[40, 240]", "[40, 80]"))
    arguments = {"model": model, "data": card, "target": NPU, "policy": policy(tmp_path, "output_sqnr_db: 40\n")}
    result = steps.compress_auto(**arguments, out=tmp_path / "q.onnx")
    *rungs, last = result.climb.attempts
    assert [a.outcome for a in rungs] == ["fail"] * len(rungs)
    assert (last.outcome, last.recipe) == ("pass", f"{min(rungs, key=lambda a: a.error).recipe}-mixed")
    assert result.climb.chosen == len(rungs)
    search = result.mixed.search
    assert search.met
    assert 0 < len(search.chosen.precision) <= len(result.mixed.layers)
    assert set(search.chosen.precision.values()) == {"int16"}
    assert result.written.sha256 == result.mixed.tried.sha256 == sha256_file(tmp_path / "q.onnx")
    report = steps.evaluate(candidate=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r.json")
    assert report.metrics == result.mixed.tried.report.metrics  # what is written is what was judged
    assert report.metrics["output_sqnr_db"] >= 40


def test_few_samples_end_with_the_nearest_int8_model_and_no_search(inputs, tmp_path):
    """200 samples cannot show that less than a point is lost: not even the float model passes."""
    model, card = inputs
    result = steps.compress_auto(model=model, data=card, out=tmp_path / "q.onnx", target=NPU)
    assert {(a.outcome, a.obstacle) for a in result.climb.attempts} <= {
        ("inconclusive", "samples"),
        ("fail", "samples"),
    }
    assert result.mixed is None
    assert result.climb.attempts[result.climb.chosen].error == min(a.error for a in result.climb.attempts)
    assert "on these samples not even the float model would pass (top1_drop: 0 lost and 0 won" in result.climb.why
    assert "more would decide" in result.climb.why


def test_what_rungs_share_is_computed_once(inputs, tmp_path, monkeypatch):
    counted = {"tables": [], "float": 0, "equalize": 0}
    count, judge, equalize = calibration.count_table, judgement.judge_of, compression.equalize

    def count_table(raw, *more):
        counted["tables"].append(raw)
        return count(raw, *more)

    def judge_of(*more):
        counted["float"] += 1
        return judge(*more)

    def equalized(*more):
        counted["equalize"] += 1
        return equalize(*more)

    monkeypatch.setattr("qcore.steps.compression.count_table", count_table)
    monkeypatch.setattr("qcore.steps.tries.judge_of", judge_of)
    monkeypatch.setattr(compression, "equalize", equalized)
    model, card = inputs
    result = steps.compress_auto(model=model, data=card, out=tmp_path / "q.onnx", target=NPU)
    assert len(result.climb.attempts) == 5
    assert len(counted["tables"]) == len(set(counted["tables"])) == 2  # folded; folded and equalized
    assert (counted["float"], counted["equalize"]) == (1, 1)


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_after_kill_9_no_finished_rung_is_made_again_and_the_bytes_are_the_same(inputs, tmp_path):
    model, card = inputs
    whole = steps.compress_auto(model=model, data=card, out=tmp_path / "whole.onnx", target=NPU)
    out = tmp_path / "q.onnx"
    journal, folder = steps.journal_path(out), steps.models_path(out)
    command = [sys.executable, "-P", "-m", "qcore", "compress", "--recipe", "auto", "--target", NPU, "--json"]
    command += ["--model", str(model), "--data", str(card), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = lines(journal)
    made = {e["result"]["sha256"] for e in before if "sha256" in e["result"]}
    assert made <= {p.stem for p in folder.glob("*.onnx")} == {sha256_file(p) for p in folder.glob("*.onnx")}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = lines(journal)
    assert after[: len(before)] == before
    trials = [json.dumps(e["trial"]) for e in after]
    assert len(trials) == len(set(trials)) == 1 + len(whole.climb.attempts)  # none twice, none missing
    assert sum(f"trying {a.recipe} 1/1" in done.stderr for a in whole.climb.attempts) == len(after) - len(before)
    assert sha256_file(out) == whole.written.sha256
    value = json.loads(done.stdout)
    assert value["stopped"] == whole.climb.why
    assert [a["error"] for a in value["ladder"]] == [a.error for a in whole.climb.attempts]
    assert not folder.exists()


def test_a_second_run_tries_nothing_and_makes_again_only_what_is_gone(inputs, tmp_path, monkeypatch):
    model, card = inputs
    arguments = {"model": model, "data": card, "out": tmp_path / "q.onnx", "target": NPU}
    first = steps.compress_auto(**arguments)
    journal = steps.journal_path(tmp_path / "q.onnx").read_bytes()
    made = []
    compress = compression.compress
    monkeypatch.setattr(
        compression, "compress", lambda m, recipe, *more: made.append(recipe) or compress(m, recipe, *more)
    )
    assert steps.compress_auto(**arguments) == first  # the output itself holds the bytes
    assert made == []
    (tmp_path / "q.onnx").unlink()
    assert steps.compress_auto(**arguments) == first
    assert [r.name for r in made] == [first.written.recipe]
    assert steps.journal_path(tmp_path / "q.onnx").read_bytes() == journal
    # another policy is another question about the same trials
    other = steps.compress_auto(**arguments, policy=policy(tmp_path, EASY))
    assert other.climb.attempts[0].outcome == "pass"
    assert len(made) == 2
    assert steps.journal_path(tmp_path / "q.onnx").read_bytes() == journal


def test_a_journal_of_a_machine_that_computes_otherwise_is_refused(inputs, tmp_path):
    model, card = inputs
    arguments = {"model": model, "data": card, "out": tmp_path / "q.onnx", "target": NPU}
    steps.compress_auto(**arguments)
    journal = steps.journal_path(tmp_path / "q.onnx")
    entries = lines(journal)
    for e in entries:
        if "sha256" in e["result"]:
            e["result"]["sha256"] = "0" * 64
        own = {k: e[k] for k in ("key", "trial", "result")}
        e["sha256"] = sha256_json(own)
    journal.write_text("".join(json.dumps(e) + "\n" for e in entries))
    with pytest.raises(ConfigError, match=r"gives other bytes than journal .* remembers; delete the journal"):
        steps.compress_auto(**arguments)


def test_a_card_without_a_split_to_judge_on_is_refused(inputs, tmp_path):
    model, card = inputs
    text = card.read_text()
    other = card.with_name("other.yaml")
    other.write_text(text.replace("  evaluation:", "  later:"))
    try:
        with pytest.raises(ConfigError, match="has splits calibration, later; results are judged on validation or"):
            steps.compress_auto(model=model, data=other, out=tmp_path / "q.onnx", target=NPU)
    finally:
        other.unlink()
    assert not (tmp_path / "q.onnx").exists()


def test_validation_comes_before_evaluation(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    card.write_text(card.read_text() + "  validation: {range: [200, 240]}\n")
    text = card.read_text().replace("[40, 240]", "[40, 200]")
    card.write_text(text)
    result = steps.compress_auto(
        model=model, data=card, out=tmp_path / "q.onnx", target=NPU, policy=policy(tmp_path, EASY)
    )
    assert result.judged_on == "validation"


def test_inputs_are_not_overwritten(inputs):
    model, card = inputs
    with pytest.raises(ConfigError, match=r"m\.onnx"):
        steps.compress_auto(model=model, data=card, out=model, target=NPU)


def command(inputs, out, *more):
    model, card = inputs
    return run(["compress", *map(str, ("--model", model, "--data", card, "--out", out)), *map(str, more)])


def test_the_command_says_what_was_tried(inputs, tmp_path, capsys):
    auto = ("--recipe", "auto", "--target", "x86-avx2", "--policy", policy(tmp_path, EASY))
    assert command(inputs, tmp_path / "q.onnx", *auto, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["output"] == str(tmp_path / "q.onnx")
    assert value["size_bytes"] == (tmp_path / "q.onnx").stat().st_size
    assert value["model"]["sha256"] == sha256_file(tmp_path / "q.onnx")
    assert [s["method"] for s in value["steps"]] == ["fold-batchnorm", "gemm-head", "quantize"]
    assert [(a["recipe"], a["outcome"]) for a in value["ladder"]] == [("auto-per-tensor", "pass")]
    fields = {"recipe", "outcome", "reason", "error", "size_bytes", "obstacle", "latency_ms"}
    assert set(value["ladder"][0]) == fields
    assert (value["chosen"], value["pareto"], value["mixed_precision"]) == (0, [0], None)
    assert "is the first that passes" in value["stopped"]
    assert value["judged_on"] == "evaluation"
    assert command(inputs, tmp_path / "q.onnx", *auto) == 0
    printed = capsys.readouterr().out
    assert "Ladder, judged on evaluation" in printed
    assert "stopped: auto-per-tensor is the first" in printed
    assert f" {value['ladder'][0]['error']:.3g} " in printed


def test_small_held_out_errors_are_told_apart(inputs, tmp_path, capsys):
    recovery = ("--recipe", "int8-rounded", "--target", "x86-vnni")
    assert command(inputs, tmp_path / "q.onnx", *recovery, "--json") == 0
    errors = [s["error"] for s in json.loads(capsys.readouterr().out)["steps"] if s["error"]]
    assert errors
    assert any(e["after"] < 1e-3 for e in errors)
    assert command(inputs, tmp_path / "q.onnx", *recovery) == 0
    printed = capsys.readouterr().out
    assert all(f"{e['before']:.3g} -> {e['after']:.3g}" in printed for e in errors)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--policy", "p.yaml"), "error: --policy is for --recipe auto"),
        (("--recipe", "int8-rounded", "--policy", "p.yaml"), "int8-rounded is applied as it is"),
    ],
)
def test_a_policy_without_auto_is_refused(inputs, tmp_path, capsys, more, message):
    assert command(inputs, tmp_path / "q.onnx", *more) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "q.onnx").exists()


def test_auto_without_data_is_refused(inputs, tmp_path, capsys):
    assert run(["compress", "--model", str(inputs[0]), "--out", str(tmp_path / "q"), "--recipe", "auto"]) == 1
    assert "recipe auto calibrates and judges, and got no data" in capsys.readouterr().err


def test_a_table_is_not_enough_for_recovery(inputs, tmp_path, capsys):
    model, card = inputs
    steps.calibrate(model=model, data=card, out=tmp_path / "t.json")
    arguments = ["--model", model, "--table", tmp_path / "t.json", "--out", tmp_path / "q", "--recipe", "int8-rounded"]
    assert run(["quantize", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert "recipe int8-rounded recovers accuracy by running samples, which a table does not hold" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "q").exists()
