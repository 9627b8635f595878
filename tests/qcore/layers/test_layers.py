"""The layer report: every number against one computed another way, and verdicts on nets whose fault is known."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import conv_head_net, conv_net, model_of, save, write_data
from onnx import helper, version_converter

from qcore import steps
from qcore.data.dataset import batches, open_dataset, some_samples
from qcore.errors import ConfigError, ModelError
from qcore.files import sha256_file
from qcore.graph.io import parse_model, serialize_model
from qcore.layers.baseline import matching_baseline
from qcore.layers.probe import probe_layers
from qcore.layers.report import judge_layers
from qcore.numerics.affine import QParams, quantize_array
from qcore.numerics.error import sqnr_db


def session(proto, names=()):
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    have = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=["x86-vnni", "npu-int8-symmetric"])
def measured(request, tmp_path_factory):
    """A net with a non-symmetric and a symmetric target: Relu and Clip absorbed in the first, there in the second."""
    folder = tmp_path_factory.mktemp("layers")
    proto = conv_net()
    model, card = save(proto, folder / "m.onnx"), write_data(folder, proto)
    steps.compress(model=model, data=card, out=folder / "q.onnx", target=request.param)
    report = steps.layers(model=folder / "q.onnx", baseline=model, data=card, out=folder / "report", samples=20)
    x = np.concatenate([b.x[""] for b in batches(some_samples(open_dataset(card, "evaluation"), 20), 5)])
    return report, proto, onnx.load(folder / "q.onnx"), x


def by_node(report):
    return {e.node: e for e in report.layers}


def test_accumulated_error_is_that_of_the_whole_quantized_graph(measured):
    report, proto, quantized, x = measured
    floats = session(proto, ["r1", "k2", "c3", "s", "p"])
    inside = {"r1": "r1_dequantized", "k2": "k2_dequantized", "c3": "c3_dequantized", "s": "s_dequantized"}
    theirs = dict(zip([o.name for o in floats.get_outputs()], floats.run(None, {"x": x}), strict=True))
    ran = session(quantized, inside.values())
    ours = dict(zip([o.name for o in ran.get_outputs()], ran.run(None, {"x": x}), strict=True))
    layers = {e.tensor: e for e in report.layers}
    for name, dequantized in {**inside, "y": "y"}.items():
        error = layers[name].accumulated
        assert error.sqnr_db == pytest.approx(sqnr_db(theirs[name], ours[dequantized]), abs=0.01)
        a, b = theirs[name].ravel().astype(float), ours[dequantized].ravel().astype(float)
        assert error.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_local_error_is_that_of_the_layer_fed_with_float_tensors(measured):
    report, proto, quantized, x = measured
    floats = session(proto, ["r1", "k2", "c3"])
    theirs = dict(zip([o.name for o in floats.get_outputs()], floats.run(None, {"x": x}), strict=True))
    # The pointwise convolution cut out of the quantized file by onnx itself, from its float input to its output.
    typed = onnx.ModelProto.FromString(quantized.SerializeToString())
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("k2", "c3_dequantized")]
    typed.graph.value_info.extend(ends)
    part = onnx.utils.Extractor(typed).extract_model(["k2"], ["c3_dequantized"])
    alone = session(part).run(["c3_dequantized"], {"k2": theirs["k2"]})[0]
    assert by_node(report)["pointwise"].local.sqnr_db == pytest.approx(sqnr_db(theirs["c3"], alone), abs=0.01)


def test_range_use_counts_the_float_values_over_the_levels(measured):
    report, proto, quantized, x = measured
    values = session(proto, ["c3"]).run(["c3"], {"x": x})[0]
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in quantized.graph.initializer}
    scale, zero = constants["c3_scale"], constants["c3_zero_point"]
    limits = np.iinfo(zero.dtype)
    q = QParams(scale=scale, zero_point=zero.astype(np.int32), dtype=str(zero.dtype), qmin=limits.min, qmax=limits.max)
    integers = quantize_array(values, q).astype(int)
    use = by_node(report)["pointwise"].activation
    low, high = (limits.min - int(zero)) * float(scale), (limits.max - int(zero)) * float(scale)
    assert (use.low, use.high) == pytest.approx((low, high))
    beyond = (values < low - scale / 2) | (values > high + scale / 2)
    assert use.saturated == pytest.approx(beyond.mean(), abs=1e-9)
    assert use.unused == pytest.approx(1 - (integers.max() - integers.min() + 1) / 256)
    counts = np.bincount((integers - limits.min).ravel(), minlength=256)
    core = round(use.core * 256)
    # the narrowest symmetric cut that keeps 99.9 %: one level less on either side would lose more than half of the rest
    assert counts.sum() * 0.999 <= max(counts[k : k + core].sum() for k in range(257 - core))
    assert 0 < use.core <= 1 - use.unused


def test_every_compute_layer_is_there_once_in_order(measured):
    report, *_ = measured
    assert [e.node for e in report.layers] == ["x", "conv1", "depthwise", "pointwise", "add", "pool", "fc"]
    assert report.skipped == ()
    weighted = {e.node for e in report.layers if e.weights is not None}
    assert weighted == {"conv1", "depthwise", "pointwise", "fc"}
    assert by_node(report)["x"].accumulated == by_node(report)["x"].local


def test_the_probed_graph_leaves_its_arguments_alone_and_is_deterministic(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    raw = [p.read_bytes() for p in (model, tmp_path / "q.onnx")]
    baseline, quantized = (parse_model(r, "m") for r in raw)
    baseline = matching_baseline(baseline, quantized)
    before = [serialize_model(m) for m in (baseline, quantized)]
    first, second = (serialize_model(probe_layers(baseline, quantized).model) for _ in range(2))
    assert first == second
    assert [serialize_model(m) for m in (baseline, quantized)] == before


def test_a_file_in_a_newer_opset_is_compared_all_the_same(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    save(version_converter.convert_version(onnx.load(tmp_path / "q.onnx"), 21), tmp_path / "q21.onnx")
    common = {"baseline": model, "data": card, "samples": 8}
    first = steps.layers(model=tmp_path / "q.onnx", out=tmp_path / "a", **common)
    second = steps.layers(model=tmp_path / "q21.onnx", out=tmp_path / "b", **common)
    assert [e.node for e in first.layers] == [e.node for e in second.layers]
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.accumulated.sqnr_db == pytest.approx(b.accumulated.sqnr_db, abs=0.01)


def test_layers_read_through_movers_and_joins(tmp_path):
    rng = np.random.default_rng(0)
    weights = {k: (rng.standard_normal((4, 4, 1, 1)) * 0.5).astype(np.float32) for k in "ab"}
    weights["head"] = rng.standard_normal((8, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["u"], name="left"),
        helper.make_node("Conv", ["x", "b"], ["v"], name="right"),
        helper.make_node("Relu", ["v"], ["vr"], name="relu"),
        helper.make_node("Concat", ["u", "vr"], ["j"], name="join", axis=1),
        helper.make_node("MaxPool", ["j"], ["m"], name="pool", kernel_shape=[4, 4]),
        helper.make_node("Flatten", ["m"], ["f"], name="flatten"),
        helper.make_node("MatMul", ["f", "head"], ["z"], name="head"),
        helper.make_node("Softmax", ["z"], ["y"], name="softmax"),
    ]
    proto = model_of(nodes, weights, inputs={"x": ["N", 4, 4, 4]}, outputs={"y": ["N", 3]})
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    quantized = parse_model((tmp_path / "q.onnx").read_bytes(), "q")
    probed = probe_layers(matching_baseline(parse_model(model.read_bytes(), "m"), quantized), quantized)
    after = {p.node: p.after for p in probed.probes}
    assert after == {
        "x": (),
        "left": ("x",),
        "right": ("x",),
        "join": ("left", "right"),
        "head": ("join",),
        "softmax": ("head",),
    }
    assert {p.node for p in probed.probes if p.local is None} == {"softmax"}  # it computes in float
    assert probed.skipped == ()
    report = steps.layers(model=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r")
    assert all(e.verdict == "fine" for e in report.layers)


def test_files_are_the_same_on_a_second_run_and_whole(tmp_path):
    proto = conv_head_net()
    card = write_data(tmp_path / "in", proto)
    model = save(proto, tmp_path / "in" / "m.onnx")
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    arguments = {"model": tmp_path / "q.onnx", "baseline": model, "data": card, "samples": 7}
    report = steps.layers(**arguments, out=tmp_path / "a")
    steps.layers(**arguments, out=tmp_path / "b" / "page.html")
    assert sha256_file(tmp_path / "a/layers.json") == sha256_file(tmp_path / "b/page.json")
    assert sha256_file(tmp_path / "a/layers.html") == sha256_file(tmp_path / "b/page.html")
    stored = json.loads((tmp_path / "a/layers.json").read_bytes())
    assert stored["schema"] == "qcore.layers/1"
    assert stored["data"]["n"] == 7
    assert stored["model"]["sha256"] == sha256_file(tmp_path / "q.onnx")
    assert len(stored["layers"]) == len(report.layers)
    assert sum(stored["verdicts"].values()) == len(report.layers)
    page = (tmp_path / "a/layers.html").read_text()
    assert stored["model"]["sha256"] in page
    assert page.count("<svg") == 2
    assert all(f'data-value="{e.node}"' in page for e in report.layers)
    loaded = page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons", "")
    assert "http" not in loaded  # names of XML vocabularies aside, nothing points outside
    assert "src=" not in loaded


def weak_layer_net(outlier):
    """Return three 1x1 convolutions; one input of the second one is `outlier` times larger and hardly matters."""
    rng = np.random.default_rng(3)
    weights = {k: (rng.standard_normal((8, 8, 1, 1)) * 0.4).astype(np.float32) for k in "abc"}
    weights["a"][0] *= outlier
    weights["b"][:, 0] /= outlier
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["u"], name="first"),
        helper.make_node("Conv", ["u", "b"], ["v"], name="second"),
        helper.make_node("Conv", ["v", "c"], ["w"], name="third"),
        helper.make_node("GlobalAveragePool", ["w"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["y"], name="flatten"),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 8, 4, 4]}, outputs={"y": ["N", 8]})


@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_the_layer_with_the_outlier_is_at_fault_and_those_behind_carry_it_on(tmp_path, outlier):
    proto = weak_layer_net(outlier)
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="npu-int8-symmetric", recipe="int8-min-max")
    report = steps.layers(model=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r")
    verdicts = {e.node: e.verdict for e in report.layers}
    if outlier == 1.0:
        assert set(verdicts.values()) == {"fine"}
        assert "No layer stands out" in report.advice()
        return
    assert verdicts["second"] == "local"  # its other seven inputs share a scale with the outlier
    assert verdicts["third"] == "accumulated"
    third = by_node(report)["third"]
    assert third.source == "second"
    assert third.local.sqnr_db > 25
    assert "second" in report.advice()


def test_saturation_is_seen_and_named(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    quantized = onnx.load(tmp_path / "q.onnx")
    for initializer in quantized.graph.initializer:
        if initializer.name == "c3_scale":  # a quarter of the range that the values need
            initializer.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(initializer) / 4, "c3_scale"))
    save(quantized, tmp_path / "q.onnx")
    report = steps.layers(model=tmp_path / "q.onnx", baseline=model, data=card, out=tmp_path / "r")
    pointwise = by_node(report)["pointwise"]
    assert pointwise.verdict == "local"
    assert pointwise.activation.saturated > 0.1
    assert "saturate" in pointwise.why


def test_what_cannot_be_compared_is_refused_and_nothing_is_written(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    common = {"baseline": model, "data": card, "out": tmp_path / "r"}
    with pytest.raises(ModelError, match=r"no QuantizeLinear .*it is a float model"):
        steps.layers(model=model, **common)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    with pytest.raises(ConfigError, match="samples is 0"):
        steps.layers(model=tmp_path / "q.onnx", samples=0, **common)
    nodes = [helper.make_node("Relu", ["other"], ["y"], name="r")]
    other = save(model_of(nodes, {}, inputs={"other": ["N", 4]}, outputs={"y": ["N", 4]}), tmp_path / "o.onnx")
    with pytest.raises(ModelError, match="the quantized model reads x"):
        steps.layers(model=tmp_path / "q.onnx", **{**common, "baseline": other})
    assert not (tmp_path / "r").exists()


def test_layers_of_another_model_are_reported_as_not_measured(tmp_path):
    proto = conv_net()
    model, card = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    steps.compress(model=model, data=card, out=tmp_path / "q.onnx", target="x86-vnni")
    renamed = onnx.ModelProto.FromString(proto.SerializeToString())
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            names[:] = ["other" if n == "c3" else n for n in names]
    report = steps.layers(
        model=tmp_path / "q.onnx", baseline=save(renamed, tmp_path / "r.onnx"), data=card, out=tmp_path / "r"
    )
    assert [(s.node, s.reason[:35]) for s in report.skipped] == [("pointwise", "the baseline has no float tensor c3")]
    assert judge_layers((), None) == ()


def test_some_samples_are_spread_and_have_a_digest_of_their_own(tmp_path):
    data = open_dataset(write_data(tmp_path, conv_net()), "evaluation")
    few = some_samples(data, 8)
    assert few.indices == tuple(range(40, 240, 25))
    assert len(few.labels) == 8
    assert few.sha256 != data.sha256
    assert some_samples(data, 999) is data
