"""The steps on files: what they write, what they refuse, and that inputs stay as they were."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import conv_net, save, write_data
from transformers import EncoderShape, encoder

from qcore import steps
from qcore.errors import CalibrationError, ConfigError, DataError, GateRefused, ModelError, PackageError
from qcore.files import sha256_file
from qcore.graph.history import HISTORY_KEY
from qcore.release.keys import create_keys, load_keys
from qcore.release.package import PackageSource, build_package, unpack_package
from qcore.release.repository import init_repository
from qcore.release.store import DirectoryStore
from qcore.release.subject import opened_package


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


def test_table_then_quantize_equals_compress_byte_for_byte(inputs, tmp_path):
    model, card = inputs
    steps.calibrate(model=model, data=card, out=tmp_path / "t.json")
    one = steps.quantize(model=model, table=tmp_path / "t.json", out=tmp_path / "q.onnx", target="x86-vnni")
    # compress calibrates the folded model: float32 rounding differs, ranges and therefore weights hardly do
    two = steps.compress(model=model, data=card, out=tmp_path / "c.onnx", target="x86-vnni")
    again = steps.compress(model=model, data=card, out=tmp_path / "d.onnx", target="x86-vnni")
    assert two.sha256 == again.sha256 == sha256_file(tmp_path / "c.onnx")
    assert [s.method for s in one.steps] == [s.method for s in two.steps] == ["fold-batchnorm", "gemm-head", "quantize"]
    assert one.size_bytes == two.size_bytes
    assert two.to_json()["output"] == str(tmp_path / "c.onnx")


def test_a_table_of_another_model_is_refused(inputs, tmp_path):
    model, card = inputs
    steps.calibrate(model=model, data=card, out=tmp_path / "t.json")
    other = save(conv_net(seed=1), tmp_path / "other.onnx")
    with pytest.raises(CalibrationError, match=r"is of model .* run `qcore calibrate` on this model"):
        steps.quantize(model=other, table=tmp_path / "t.json", out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_sparse_recipes_prune_before_they_calibrate(inputs, tmp_path):
    model, card = inputs
    summary = steps.compress(model=model, data=card, out=tmp_path / "s.onnx", recipe="sparse50-int8", target="x86-vnni")
    graph = onnx.load(tmp_path / "s.onnx").graph
    weights = [onnx.numpy_helper.to_array(i) for i in graph.initializer if "_pruned_quantized" in i.name]
    assert [s.method for s in summary.steps] == ["fold-batchnorm", "prune", "gemm-head", "quantize"]
    assert len(weights) == 4
    assert all(np.mean(w == 0) >= 0.5 for w in weights)
    with pytest.raises(ConfigError, match=r"changes weights \(prune\) before it quantizes"):
        steps.quantize(model=model, table=tmp_path / "no.json", out=tmp_path / "q.onnx", recipe="sparse50-int8")


@pytest.mark.parametrize(("n", "batch"), [(1, "N"), (3, "N"), (4, "N"), (5, "N"), (24, 8)])
@pytest.mark.parametrize("recipe", ["int8-rounded", "int8-equalized"])
def test_recovery_that_nobody_can_judge_is_not_kept(n, batch, recipe, tmp_path):
    proto = conv_net(batch=batch)
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, conv_net())
    card.write_text(card.read_text().replace("[0, 40]", f"[0, {n}]"))
    options = {"model": model, "data": card, "target": "x86-vnni"}
    summary = steps.compress(**options, out=tmp_path / "q.onnx", recipe=recipe)
    plain = steps.compress(**options, out=tmp_path / "p.onnx", recipe="int8")
    mending = [s for s in summary.to_json()["steps"] if s["method"] in ("equalize", "correct-bias", "round-weights")]
    assert mending
    if n in (4, 5):
        assert all(s["error"] is not None and s["reason"] is None for s in mending)
        return
    have = "3 batches of 8" if batch == 8 else f"{n} samples"
    for s in mending:
        assert (s["kept"], s["changed"], s["error"]) == (False, [], None)
        assert s["reason"] == f"not judged: of {have} none can be held out; at least 4 are needed"
    assert recipe != "int8-rounded" or nameless(tmp_path / "q.onnx") == nameless(tmp_path / "p.onnx")
    assert (summary.sha256 == plain.sha256) is False  # the file says by which recipe it was made


def nameless(path):
    """Return the bytes of a model without what it says of its own making."""
    proto = onnx.load(path)
    kept = [p for p in proto.metadata_props if p.key != HISTORY_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    return proto.SerializeToString(deterministic=True)


def test_a_ladder_on_too_few_samples_keeps_no_recovery(inputs, tmp_path):
    model, card = inputs
    few = tmp_path / "few.yaml"
    few.write_text(card.read_text().replace("[0, 40]", "[0, 2]").replace("tiny.npz", str(card.parent / "tiny.npz")))
    result = steps.compress_auto(model=model, data=few, out=tmp_path / "q.onnx", target="x86-vnni")
    assert all(s.kept is (s.reason is None) for s in result.written.steps)


def test_nothing_asked_of_prune_gives_the_same_bytes(inputs, tmp_path):
    model, _ = inputs
    assert steps.prune(model=model, out=tmp_path / "p.onnx", sparsity=0.0).sha256 == sha256_file(model)
    assert steps.prune(model=model, out=tmp_path / "p.onnx", sparsity=0.5).sha256 != sha256_file(model)
    with pytest.raises(ConfigError, match="sparsity"):
        steps.prune(model=model, out=tmp_path / "p.onnx", sparsity=1.0)


def test_evaluate_then_package_then_gate_hold_one_digest(inputs, tmp_path):
    model, card = inputs
    keys = create_keys(tmp_path / "keys", ["stable"])
    summary = steps.compress(model=model, data=card, out=tmp_path / "q.onnx", recipe="int8-min-max")
    report = steps.evaluate(candidate=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r.json")
    arguments = {"model": tmp_path / "q.onnx", "data": card, "family": "f", "version": "1"}
    built = steps.package(**arguments, out=tmp_path / "a.qpkg")
    assert steps.package(**arguments, out=tmp_path / "b.qpkg").sha256 == built.sha256
    policy = tmp_path / "policy.yaml"
    policy.write_text("agreement: {min: 0.5}\n")
    gate = {"report": tmp_path / "r.json", "key": keys.folder / "gate.pem", "policy": policy}
    decision = steps.gate(**gate, package=built.path, out=tmp_path / "e.json")
    assert report.model.sha256 == decision.model_sha256 == built.manifest.model_sha256 == summary.sha256
    assert report.baseline.sha256 == sha256_file(model)
    assert report.n == 200
    assert decision.outcome == "pass"
    assert decision.package is not None
    assert (decision.package.sha256, decision.package.version) == (sha256_file(built.path), "1")


@pytest.fixture
def measured(inputs, tmp_path):
    """What the gate is asked about a candidate, and what its package is built from."""
    model, card = inputs
    keys = create_keys(tmp_path / "keys", ["stable"])
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="arm-dotprod")
    steps.evaluate(candidate=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r.json")
    (tmp_path / "p.yaml").write_text("output_sqnr_db: -300\n")
    gate = {"report": tmp_path / "r.json", "key": keys.folder / "gate.pem", "policy": tmp_path / "p.yaml"}
    source = {"model": tmp_path / "q.onnx", "data": card, "family": "f", "version": "1"}
    return gate, source


def test_a_package_names_the_target_that_the_model_was_quantized_for(measured, tmp_path):
    _, source = measured
    assert steps.package(**source, out=tmp_path / "a.qpkg").manifest.compat.hardware == ("arm-dotprod",)
    with pytest.raises(PackageError, match="quantized for arm-dotprod, the package is to be for x86-vnni"):
        steps.package(**source, target="x86-vnni", out=tmp_path / "b.qpkg")
    assert not (tmp_path / "b.qpkg").exists()


def test_what_devices_would_not_load_is_not_packaged(measured, tmp_path):
    _, source = measured
    model = onnx.load(source["model"])
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [model.graph.output[0].name], ["same"])],
        "body",
        [],
        [onnx.helper.make_tensor_value_info("same", 1, None)],
    )
    yes = onnx.numpy_helper.from_array(np.bool_(True), "yes")
    branching = onnx.helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)
    model.graph.initializer.append(yes)
    model.graph.node.append(branching)
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["N", 4]))
    source["model"] = tmp_path / "branching.onnx"
    onnx.save(model, source["model"])
    with pytest.raises(ModelError, match=r"If is control flow.*declare it"):
        steps.package(**source, out=tmp_path / "p.qpkg")
    assert not (tmp_path / "p.qpkg").exists()
    declared = steps.package(**source, control_flow=True, out=tmp_path / "p.qpkg")
    assert declared.manifest.compat.control_flow
    with opened_package(declared.path) as opened:  # as gate, publisher and auditor do
        assert opened.manifest == declared.manifest
    hidden = rebuilt(declared.path, tmp_path, compat=replace(declared.manifest.compat, control_flow=False))
    with pytest.raises(PackageError, match="If is control flow"), opened_package(hidden.path):
        pass


def rebuilt(package, tmp_path, **changes):
    """Return the package again with a manifest that says something else: its builder is not trusted."""
    manifest = unpack_package(package, tmp_path / "unpacked")
    source = PackageSource(
        family=manifest.family,
        version=manifest.version,
        model=tmp_path / "unpacked" / "model.onnx",
        golden=tmp_path / "unpacked" / "golden.npz",
        card=tmp_path / "unpacked" / "card.md",
        sbom=tmp_path / "unpacked" / "sbom.cdx.json",
        compat=manifest.compat,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        golden_limits=manifest.golden,
        provenance=manifest.provenance,
    )
    return build_package(replace(source, **changes), tmp_path / "changed.qpkg")


def test_a_package_that_does_not_fit_the_report_gets_no_decision(measured, inputs, tmp_path):
    gate, source = measured
    built = steps.package(**source, out=tmp_path / "a.qpkg")
    m = built.manifest
    compat = m.compat
    for name, change, says in (
        ("device", {"compat": replace(compat, hardware=("x86-vnni",))}, "its model was quantized for arm-dotprod"),
        ("opset", {"compat": replace(compat, opset=99)}, "opset 99, its model has"),
        ("input", {"inputs": (replace(m.inputs[0], name="other"),)}, "golden.npz: holds"),
        ("output", {"outputs": m.outputs * 2}, "golden.npz: holds"),
        (
            "data",
            {"provenance": replace(m.provenance, data_sha256="0" * 64)},
            "golden samples are of data 000000000000",
        ),
        ("provenance", {"provenance": None}, "does not say where its golden samples come from"),
        ("model", {"model": inputs[0]}, "evaluate the model that is packaged"),
    ):
        (tmp_path / name).mkdir()
        bad = rebuilt(built.path, tmp_path / name, **change)
        with pytest.raises((GateRefused, PackageError), match=says):
            steps.gate(**gate, package=bad.path, out=tmp_path / "e.json")
    whole = bytearray(built.path.read_bytes())
    whole[-2000] ^= 1
    (tmp_path / "flipped.qpkg").write_bytes(whole)
    with pytest.raises(PackageError):
        steps.gate(**gate, package=tmp_path / "flipped.qpkg", out=tmp_path / "e.json")
    other = steps.package(**source, split="calibration", out=tmp_path / "c.qpkg")
    with pytest.raises(GateRefused, match="package with the card and split that were evaluated"):
        steps.gate(**gate, package=other.path, out=tmp_path / "e.json")
    assert not (tmp_path / "e.json").exists()
    assert steps.gate(**gate, package=built.path, out=tmp_path / "e.json").outcome == "pass"


def test_a_local_decision_is_not_published(measured, tmp_path):
    gate, source = measured
    now = datetime.now(UTC)
    init_repository(DirectoryStore(folder=tmp_path / "repo"), load_keys(gate["key"].parent), ["stable"], now=now)
    built = steps.package(**source, out=tmp_path / "a.qpkg")
    assert steps.gate(**gate, out=tmp_path / "e.json").outcome == "pass"
    before = sorted((tmp_path / "repo").rglob("*"))
    shipped = {"package": built.path, "repository": tmp_path / "repo", "keys": gate["key"].parent}
    with pytest.raises(GateRefused, match=r"names no package.*run `qcore gate --report R --package P`"):
        steps.publish(**shipped, evidence=tmp_path / "e.json")
    assert sorted((tmp_path / "repo").rglob("*")) == before
    steps.gate(**gate, package=built.path, out=tmp_path / "e.json")
    assert steps.publish(**shipped, evidence=tmp_path / "e.json").sha256 == built.sha256


def test_models_with_a_fixed_batch_are_calibrated_and_evaluated(tmp_path):
    proto = conv_net(batch=16)
    symbolic = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, symbolic)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx")
    report = steps.evaluate(candidate=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r.json")
    assert report.n == 200  # 12 full batches and one filled up
    assert report.metrics["baseline_top1"] == 1.0


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "nowhere.onnx"}, ModelError, "nowhere.onnx does not exist"),
        ({"data": "nowhere.yaml"}, DataError, "nowhere.yaml does not exist"),
        ({"split": "train"}, DataError, "no split 'train'; allowed: calibration, evaluation"),
        (
            {"recipe": "int9"},
            ConfigError,
            "recipe 'int9' does not exist; allowed: channels60, channels60-tuned, cluster16, ",
        ),
        ({"target": "tpu"}, ConfigError, "target 'tpu' does not exist; allowed: arm-dotprod"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(inputs, tmp_path, change, error, says):
    model, card = inputs
    change = {k: Path(v) if k in ("model", "data") else v for k, v in change.items()}
    with pytest.raises(error, match=says):
        steps.compress(**{"model": model, "data": card, "out": tmp_path / "out" / "q.onnx", **change})
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_the_output(inputs):
    model, card = inputs
    with pytest.raises(ConfigError, match="is also an input"):
        steps.compress(model=model, data=card, out=model)


@pytest.mark.parametrize("name", ["tiny.npz", "tiny.yaml"])
def test_the_files_of_a_card_are_never_the_output(inputs, name):
    model, card = inputs
    with pytest.raises(ConfigError, match="is also an input"):
        steps.compress(model=model, data=card, out=card.parent / name)
    with pytest.raises(ConfigError, match="is also an input"):
        steps.calibrate(model=model, data=card.parent, out=card.parent / name)
    with pytest.raises(ConfigError, match="is also an input"):
        steps.evaluate(candidate=model, baseline=model, data=card, out=card.parent / name)


def test_table_recipe_and_target_are_never_the_output(inputs, tmp_path):
    model, card = inputs
    table, recipe, target = tmp_path / "t.json", tmp_path / "r.yaml", tmp_path / "t.yaml"
    steps.calibrate(model=model, data=card, out=table)
    recipe.write_text("name: r\nsteps: [{method: fold-batchnorm}]\n")
    target.write_text("name: t\ndescription: d\nactivations: int8\nquantize: [Conv]\n")
    for out in (table, recipe, target):
        before = out.read_bytes()
        with pytest.raises(ConfigError, match="is also an input"):
            steps.quantize(model=model, table=table, out=out, recipe=str(recipe), target=str(target))
        assert out.read_bytes() == before


def test_what_is_no_regular_file_is_never_replaced(inputs, tmp_path):
    model, _ = inputs
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        steps.prune(model=model, out=tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "change",
    [
        {"options": None},
        {"key": "0" * 64},
        {"positions": [[0, 9999]]},
        {"positions": []},
        {"average": {"weight": "1", "low_sum": "5", "high_sum": "4"}},
        {"tensors": {}},
        {"low": 9e9},
        {"low": float("nan")},
        {"count": 0},
        {"exponent": 99999},
        {"first": 7},
    ],
)
def test_an_edited_table_is_refused(inputs, tmp_path, change):
    model, card = inputs
    steps.calibrate(model=model, data=card, out=tmp_path / "t.json")
    value = json.loads((tmp_path / "t.json").read_text())
    for key, new in change.items():
        place = value if key in value else value["tensors"]["x"]
        place[key] = new
    (tmp_path / "t.json").write_text(json.dumps(value))
    with pytest.raises((CalibrationError, ModelError)):
        steps.quantize(model=model, table=tmp_path / "t.json", out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    model = save(conv_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "tiny.npz", x=np.zeros((240, 1, 28, 28), np.float32), y=np.zeros(240, int))
    (tmp_path / "tiny.yaml").write_text("name: t\npath: tiny.npz\nsplits: {calibration: {}}\n")
    with pytest.raises(DataError, match=r"samples have shape \(1, 28, 28\); input 'x' of .* wants \(3, 8, 8\)"):
        steps.calibrate(model=model, data=tmp_path / "tiny.yaml", out=tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


MEASURE = """
import sys
from pathlib import Path
from qcore import steps
steps.calibrate(model=Path(sys.argv[1]), data=Path(sys.argv[2]), out=Path(sys.argv[3]), split=sys.argv[4])
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(line.split()[1])
"""


def test_memory_of_calibration_does_not_grow_with_the_samples(tmp_path):
    save(conv_net(), tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((20_000, 3, 8, 8)).astype(np.float32)  # 15 MB, compressed or not
    np.savez_compressed(tmp_path / "d.npz", x=x, y=np.zeros(len(x), int))
    (tmp_path / "d.yaml").write_text(
        "name: d\npath: d.npz\nsplits: {few: {range: [0, 50]}, many: {range: [0, 4000]}}\n"
    )

    def peak_kib(split):
        command = [
            sys.executable,
            "-c",
            MEASURE,
            *map(str, (tmp_path / "m.onnx", tmp_path / "d.yaml", tmp_path / "t")),
            split,
        ]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    few, many = peak_kib("few"), peak_kib("many")
    assert many - few < 8 * 1024  # 4000 samples are 3 MB; their activations 60 MB; the whole array 15 MB


def test_reports_are_json_with_the_promised_fields(inputs, tmp_path):
    model, card = inputs
    steps.evaluate(candidate=model, baseline=model, data=card, out=tmp_path / "r.json")
    value = json.loads((tmp_path / "r.json").read_text())
    assert value["metrics"]["top1"] == value["metrics"]["baseline_top1"] == value["metrics"]["agreement"] == 1.0
    assert value["n"] == 200
    assert value["model"]["sha256"] == sha256_file(model)
    assert value["model"]["size_bytes"] == model.stat().st_size
    assert value["latency_ms"]["p50"] > 0


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-weights", "int4-weights", "float16"])
def test_recipes_without_calibration_need_no_data_and_can_be_evaluated(tmp_path, recipe):
    proto = encoder(0, EncoderShape(width=64, heads=4, hidden=128))
    model = save(proto, tmp_path / "m.onnx")
    before = sorted(p.name for p in tmp_path.iterdir())
    summary = steps.compress(model=model, out=tmp_path / "o" / "c.onnx", recipe=recipe, target="x86-avx2")
    again = steps.compress(model=model, out=tmp_path / "o" / "d.onnx", recipe=recipe, target="x86-avx2")
    assert summary.sha256 == again.sha256
    assert summary.target == ("x86-avx2" if recipe == "int8-dynamic" else "any")
    assert summary.size_bytes < 0.56 * summary.input_size_bytes
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == before
    card = write_data(tmp_path / "data", proto)
    card.write_text(card.read_text().replace("layout: NCHW\n", ""))
    report = steps.evaluate(candidate=tmp_path / "o" / "c.onnx", baseline=model, data=card, out=tmp_path / "r.json")
    assert report.metrics["agreement"] > (0.7 if recipe == "int4-weights" else 0.9)


def test_a_recipe_that_calibrates_says_that_it_needs_data(inputs, tmp_path):
    model, _ = inputs
    with pytest.raises(ConfigError, match=r"recipe int8 calibrates and got no data; .* pass --data CARD"):
        steps.compress(model=model, out=tmp_path / "c.onnx")
    assert not (tmp_path / "c.onnx").exists()
