"""The bars on real models and real images; skipped where they are not at hand (see the `bench` fixture)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qcore import steps
from qcore.files import write_json
from qcore.runtime.ort import optimized_ops

FLOAT_KERNELS = {"Conv", "FusedConv", "ConvInteger"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "card", "convolutions"),
    [("efficientnet_lite0", "imagenet500_eff0", 49), ("mobilenetv2_100_224", "imagenet500", 52)],
)
def test_int8_is_within_a_point_of_float_and_runs_on_integers(bench, tmp_path, name, card, convolutions):
    model, data, out = bench / f"models/{name}.onnx", bench / f"{card}.yaml", tmp_path / "int8.onnx"
    steps.compress(model=model, data=data, out=out)
    report = steps.evaluate(candidate=out, baseline=model, data=data, out=tmp_path / "report.json")
    assert report.n == 400
    assert report.metrics["top1_delta"] >= -0.01
    assert report.metrics["agreement"] >= 0.97
    ops = optimized_ops(out.read_bytes())
    assert ops["QLinearConv"] == convolutions  # MobileNetV2's 53rd, the head, runs as a QGemm with float logits
    assert not FLOAT_KERNELS & set(ops)


@pytest.mark.slow
def test_a_real_model_goes_through_the_pipeline_to_a_device(bench, tmp_path):
    command = [sys.executable, "-P", "-m", "qcore", "pipeline", "run", "--json", "--workspace", str(tmp_path / "w")]
    command += ["--model", str(bench / "models/resnet8_cifar10.onnx"), "--data", str(bench / "cifar10.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["outcome"] == "pass"
    assert facts["decision"]["n"] == 10_000
    assert [t["state"] for t in facts["tasks"]] == ["done"] * 10
    assert facts["device"]["model_sha256"] == facts["decision"]["model_sha256"] == facts["release"]["model_sha256"]
    assert (Path(facts["device"]["slot"]) / "model.onnx").is_file()


@pytest.mark.slow
def test_a_real_model_is_reviewed_with_all_that_is_known(bench, tmp_path):
    model, data, out = bench / "models/resnet8_cifar10.onnx", bench / "cifar10.yaml", tmp_path / "int8.onnx"
    write_json(tmp_path / "summary.json", steps.compress(model=model, data=data, out=out).to_json())
    steps.calibrate(model=model, data=data, out=tmp_path / "table.json")
    steps.evaluate(candidate=out, baseline=model, data=data, out=tmp_path / "report.json")
    steps.layers(model=out, baseline=model, data=data, out=tmp_path / "layers.html")
    steps.parity(model=out, data=data, out=tmp_path / "parity.json", samples=8)
    beside = steps.Beside(
        summaries=[tmp_path / "summary.json"],
        layers=[tmp_path / "layers.json"],
        parity=[tmp_path / "parity.json"],
        models=[out],
        tables=[tmp_path / "table.json"],
        data=data,
    )
    files = steps.review_paths(tmp_path / "review")
    found = steps.review(reports=[("ptq", tmp_path / "report.json")], out=files, beside=beside)
    assert found.title == "resnet8_cifar10.onnx"
    source = found.judged.source
    assert len(source.ranges.fits) >= 14  # every activation that is quantized
    assert all(20 < fit.sqnr_db < 60 for fit in source.ranges.fits)
    report = source.report
    assert len(found.judged.flips.right_to_wrong) == report.paired.only_baseline_right
    assert "3 cat" in files.page.read_text()
    assert files.page.stat().st_size < 500_000


@pytest.mark.slow
def test_a_few_float_layers_bring_back_what_one_scale_per_tensor_loses(bench, tmp_path):
    """EfficientNet-Lite0 with one weight scale per tensor loses 8.75 points; 8 of 60 layers in float leave 0.75."""
    recipe = tmp_path / "per-tensor.yaml"
    quantize = "{method: quantize, ranges: percentile, percentile: 99.999, per_channel: false}"
    recipe.write_text(f"name: per-tensor\nsteps: [{{method: fold-batchnorm}}, {{method: gemm-head}}, {quantize}]\n")
    model, data, out = bench / "models/efficientnet_lite0.onnx", bench / "imagenet500_eff0.yaml", tmp_path / "q.onnx"
    arguments = {"model": model, "data": data, "target": "x86-vnni", "recipe": str(recipe), "max_drop": 0.01}
    result = steps.mixed_precision(**arguments, out=out)
    search = result.found.search
    assert search.met
    assert search.attempts[0].trial.error > 0.05
    assert len(search.chosen.precision) <= 15
    assert out.stat().st_size < 0.4 * model.stat().st_size
    report = steps.evaluate(candidate=out, baseline=model, data=data, out=tmp_path / "report.json")
    assert report.metrics["top1_delta"] == -search.chosen.trial.error >= -0.01


@pytest.mark.slow
@pytest.mark.parametrize(("target", "agreement"), [("x86-vnni", 0.85), ("x86-avx2", None)])
def test_what_a_cpu_without_vnni_makes_of_a_file(bench, tmp_path, target, agreement):
    """ResNet8-large for x86-vnni agrees with itself on 49 of 64 images there; for x86-avx2 nothing saturates."""
    model, data, out = bench / "models/resnet8large_cifar10.onnx", bench / "cifar10.yaml", tmp_path / "q.onnx"
    steps.compress(model=model, data=data, out=out, target=target)
    report = steps.parity(model=out, data=data, out=tmp_path / "parity.json")
    found = {c.name: c for c in report.conditions}
    assert found["exact-integers"].agreement >= 0.98
    if agreement is None:
        assert found["saturating-pairs"].sqnr_db == found["exact-integers"].sqnr_db
        assert all(c.verdict != "far" for c in report.conditions)
    else:
        assert report.worst.name == "saturating-pairs"
        assert report.worst.agreement < agreement
        assert report.worst.top1 < report.top1 - 0.1
