"""`recipe: auto` on files: the first recipe that passes, or the nearest one and the reason why none does."""

import json

import onnx
import pytest
from models import conv_net, save, write_data
from recovering import outlier_net

from qcore import steps
from qcore.cli.main import run
from qcore.errors import ConfigError
from qcore.files import sha256_file

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
    assert all(a.outcome == "fail" for a in attempts)
    tried = ("per-tensor", "min-max", "correct-bias", "equalize", "round-weights", "mixed-precision")
    assert [a.recipe for a in attempts] == [f"auto-{name}" for name in tried]  # 16-bit activations come last
    assert attempts[result.climb.chosen].error == min(a.error for a in attempts)
    assert result.written.recipe == attempts[result.climb.chosen].recipe
    assert result.written.sha256 == sha256_file(tmp_path / "q.onnx")
    assert result.climb.why.startswith(f"no recipe passes; {result.written.recipe} is nearest to float (held-out error")
    assert result.climb.why.endswith("what needs no training is exhausted: train (qcore finetune --method qat)")


def test_a_card_without_a_split_to_judge_on_is_refused(inputs, tmp_path):
    model, card = inputs
    text = card.read_text()
    other = card.with_name("other.yaml")
    other.write_text(text.replace("  evaluation:", "  later:"))
    try:
        with pytest.raises(ConfigError, match="has splits calibration, later; recipe auto judges on validation or"):
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
    assert set(value["ladder"][0]) == {"recipe", "outcome", "reason", "error", "size_bytes"}
    assert "is the first that passes" in value["stopped"]
    assert value["judged_on"] == "evaluation"
    assert command(inputs, tmp_path / "q.onnx", *auto) == 0
    printed = capsys.readouterr().out
    assert "Ladder, judged on evaluation" in printed
    assert "stopped: auto-per-tensor is the first" in printed


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
