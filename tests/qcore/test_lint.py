import json

import numpy as np
import onnx
import pytest
from models import conv_head_net, conv_net, model_of, save
from onnx import helper, numpy_helper
from quantizing import TARGETS, profile, quantized, written

from qcore import steps
from qcore.cli.main import run
from qcore.data.dataset import batches, open_dataset
from qcore.graph.io import parse_model, serialize_model
from qcore.lint import Finding, lint
from qcore.runtime.ort import feeds, load
from qcore.target import TargetProfile, load_target


def findings(file: onnx.ModelProto, target: str | TargetProfile) -> list[Finding]:
    chosen = load_target(target) if isinstance(target, str) else target
    return list(lint(parse_model(file.SerializeToString(), "m"), chosen))


def rules(file: onnx.ModelProto, target: str | TargetProfile) -> set[str]:
    return {f.rule for f in findings(file, target)}


def set_constant(file: onnx.ModelProto, name: str, array: np.ndarray) -> onnx.ModelProto:
    for i in file.graph.initializer:
        if i.name == name:
            i.CopyFrom(numpy_helper.from_array(array, name))
    return file


def constant(file: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(i) for i in file.graph.initializer if i.name == name)


def transformer():
    """Return one head of attention with its surroundings: (N,5,8) -> (N,5,8)."""
    rng = np.random.default_rng(0)
    weights = {k: (rng.standard_normal((8, 8)) * 0.4).astype(np.float32) for k in "qkvo"}
    weights |= {"g": np.ones(8, np.float32), "b": np.zeros(8, np.float32), "d": np.array(2.8, np.float32)}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"], name="norm"),
        *(helper.make_node("MatMul", ["n", k], [f"{k}1"], name=k) for k in "qkv"),
        helper.make_node("Transpose", ["k1"], ["kt"], name="transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q1", "kt"], ["a"], name="scores"),
        helper.make_node("Div", ["a", "d"], ["s"], name="scale"),
        helper.make_node("Softmax", ["s"], ["p"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v1"], ["h"], name="heads"),
        helper.make_node("MatMul", ["h", "o"], ["out"], name="out"),
        helper.make_node("Add", ["out", "x"], ["r"], name="residual"),
        helper.make_node("Gelu", ["r"], ["y"], name="gelu"),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 5, 8]}, outputs={"y": ["N", 5, 8]}, opset=20)


MODELS = {"conv": conv_net, "head": conv_head_net, "transformer": transformer}
VARIANTS = [
    {},
    {"integer_io": True},
    {"opset": 21},
    {"reduce_range": True},
    {"weights": "int4", "depthwise_weights": None},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda f: next(iter(f), "plain"))
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", TARGETS)
def test_what_the_quantizer_writes_satisfies_its_profile(name, make, fields):
    target = profile(name, integer_only=False, **fields)
    if target.opset is not None and make is transformer:
        target = target.model_copy(update={"opset": 20})
    assert findings(written(quantized(make(), target)), target) == []


@pytest.mark.parametrize("make", [conv_net, conv_head_net])
@pytest.mark.parametrize("name", TARGETS)
def test_so_does_the_operator_form_and_the_wide_one(name, make):
    if name != "tensorrt":
        file = onnx.ModelProto.FromString(serialize_model(quantized(make(), name, form="qoperator").model))
        assert findings(file, name) == []
    wide = profile(name, activations=load_target(name).wide_activations)
    assert findings(written(quantized(make(), wide)), wide) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("resnet8_cifar10", "cifar10"),
        ("mobilenetv1_075_192", "imagenet500_192"),
        ("mobilenetv2_100_224", "imagenet500"),
        ("efficientnet_lite0", "imagenet500_eff0"),
    ],
)
def test_real_models_satisfy_every_profile(bench, tmp_path, name, card, target):
    model, out, table, data = bench / f"models/{name}.onnx", *(tmp_path / n for n in ("q.onnx", "t.json", "d.yaml"))
    loaded = load(model.read_bytes())
    fed = feeds(loaded, next(batches(open_dataset(bench / f"{card}.yaml", "calibration"), 4)))
    np.savez(tmp_path / "d.npz", **fed)
    inputs = json.dumps({k: k for k in fed})
    split = "splits: {calibration: {range: [0, 4]}}"
    data.write_text(f"name: few\npath: d.npz\ntask: none\ninputs: {inputs}\n{split}\n")
    steps.calibrate(model=model, data=data, out=table)
    steps.quantize(model=model, table=table, out=out, target=target)
    assert steps.lint(model=out, target=target).findings == ()


def test_a_float_model_is_one_island_after_the_other():
    found = findings(conv_net(), "x86-vnni")
    assert {f.where for f in found if f.rule == "float-island"} == {
        "conv1",
        "depthwise",
        "pointwise",
        "add",
        "pool",
        "fc",
    }
    assert all("float input" in f.observed for f in found)


def test_a_node_that_was_left_out_is_named():
    file = written(quantized(conv_net(), "x86-vnni", exclude=("pointwise",)))
    assert [(f.rule, f.where) for f in findings(file, "x86-vnni")] == [("float-island", "pointwise")]


def test_wrong_dtypes():
    unsigned = written(quantized(conv_net(), "x86-vnni"))
    assert "activation-dtype" in rules(unsigned, "arm-dotprod")
    assert "weight-dtype" in rules(unsigned, "x86-avx2")
    assert rules(written(quantized(conv_net(), "x86-avx2")), "x86-vnni") == {"weight-dtype"}


def test_single_nodes_of_sixteen_bits_where_the_device_has_none():
    options = {"precision": {"depthwise": "int16"}}
    file = written(quantized(conv_net(), "npu-int8-symmetric", **options))
    assert rules(file, "npu-int8-symmetric") == set()
    assert rules(file, profile("npu-int8-symmetric", mixed=())) == {"activation-dtype"}


def test_asymmetric_zero_points():
    asymmetric = written(quantized(conv_net(), profile("npu-int8-symmetric", activations_symmetric=False)))
    found = [f for f in findings(asymmetric, "npu-int8-symmetric") if f.rule == "zero-point"]
    assert {f.where for f in found} >= {"r1_quantize", "r1_dequantize"}
    assert {f.allowed for f in found} == {"0"}


def test_scales_per_channel_where_one_is_allowed():
    file = written(quantized(conv_net(), profile("npu-int8-symmetric", weights_per_channel=True)))
    found = findings(file, "npu-int8-symmetric")
    assert {f.rule for f in found} == {"per-channel"}
    assert ("w2_dequantize", "6 scales") in {(f.where, f.observed) for f in found}


def test_scales_that_are_no_powers_of_two():
    file = written(quantized(conv_net(), "npu-int8-symmetric"))
    assert rules(file, "fixed-point-pow2") == {"power-of-two"}
    set_constant(file := written(quantized(conv_net(), "fixed-point-pow2")), "x_scale", np.array(0.03, np.float32))
    found = [f for f in findings(file, "fixed-point-pow2") if f.rule == "power-of-two"]
    assert {(f.where, f.observed) for f in found} == {("x_quantize", "0.03"), ("x_dequantize", "0.03")}


def test_a_bias_that_is_float_or_has_another_scale():
    assert rules(written(quantized(conv_net(), profile("x86-vnni", bias="float"))), "x86-vnni") == {"bias"}
    assert rules(written(quantized(conv_net(), "x86-vnni")), profile("x86-vnni", bias="float")) == {"bias"}
    file = written(quantized(conv_net(), "x86-vnni"))
    set_constant(file, "b3_scale", constant(file, "b3_scale") * 2)
    assert [(f.rule, f.where) for f in findings(file, "x86-vnni")] == [("bias-scale", "pointwise")]


def test_weights_with_more_levels_than_the_kernels_bear():
    file = written(quantized(conv_net(), "x86-vnni"))
    found = findings(file, profile("x86-vnni", reduce_range=True))
    assert {(f.rule, f.observed) for f in found} == {("weight-bits", "level 127")}


def test_another_opset():
    file = written(quantized(conv_net(), "x86-vnni"))
    assert findings(file, profile("x86-vnni", opset=21)) == [
        Finding(rule="opset", where="model", observed="17", allowed="21")
    ]


def test_float_inputs_and_outputs():
    file = written(quantized(conv_net(), profile("x86-vnni", float_output=False)))
    found = findings(file, profile("x86-vnni", integer_io=True))
    assert [(f.rule, f.where, f.observed) for f in found] == [
        ("graph-io", "input x", "float"),
        ("graph-io", "output y", "float"),
    ]


def test_scales_that_change_where_values_are_only_moved():
    file = written(quantized(conv_net(), "x86-vnni"))
    set_constant(file, "f_scale", constant(file, "f_scale") * 2)
    assert "same-scale" in rules(file, "x86-vnni")
    branches = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Concat", ["c", "x"], ["y"], name="concat", axis=1),
    ]
    w = np.full((3, 3, 1, 1), 0.1, np.float32)
    proto = model_of(branches, {"w": w}, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": ["N", 6, 4, 4]})
    own = written(quantized(proto, profile("npu-int8-symmetric", one_scale=())))
    assert [(f.rule, f.where) for f in findings(own, "npu-int8-symmetric")] == [("same-scale", "concat")]


def test_operators_that_an_integer_device_does_not_have():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Exp", ["c"], ["y"], name="exp"),
    ]
    w = np.full((3, 3, 1, 1), 0.1, np.float32)
    proto = model_of(nodes, {"w": w}, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": ["N", 3, 4, 4]})
    file = written(quantized(proto, "fixed-point-pow2"))
    assert [(f.rule, f.where, f.observed) for f in findings(file, "fixed-point-pow2")] == [
        ("unsupported-op", "exp", "Exp")
    ]
    assert findings(file, profile("fixed-point-pow2", integer_only=False)) == []


def test_shapes_are_no_data():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "i"], ["n"], name="batch"),
        helper.make_node("Concat", ["n", "rest"], ["to"], name="target", axis=0),
        helper.make_node("Reshape", ["c", "to"], ["y"], name="reshape"),
    ]
    weights = {"w": np.full((3, 3, 1, 1), 0.1, np.float32), "i": np.array([0]), "rest": np.array([-1])}
    proto = model_of(nodes, weights, inputs={"x": ["N", 3, 4, 4]}, outputs={"y": ["N", 48]})
    assert findings(written(quantized(proto, "fixed-point-pow2")), "fixed-point-pow2") == []


def test_the_command_line_says_what_is_wrong_and_exits_with_one(tmp_path, capsys):
    path = save(written(quantized(conv_net(), "x86-vnni", exclude=("pointwise",))), tmp_path / "q.onnx")
    assert run(["lint", "--model", str(path), "--target", "x86-vnni", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["satisfied"] is False
    assert [f["where"] for f in facts["findings"]] == ["pointwise"]
    assert run(["lint", "--model", str(path), "--target", "x86-vnni"]) == 1
    assert "float-island" in capsys.readouterr().out
    good = save(written(quantized(conv_net(), "x86-vnni")), tmp_path / "good.onnx")
    assert run(["lint", "--model", str(good), "--target", "x86-vnni"]) == 0
    assert "0 findings" in capsys.readouterr().out


def test_compress_names_every_breach_that_lint_finds_and_writes_all_the_same(tmp_path, capsys):
    model = save(transformer(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).standard_normal((16, 5, 8)).astype(np.float32))
    (tmp_path / "d.yaml").write_text(
        "name: d\npath: d.npz\ntask: none\ninputs: {x: x}\nsplits:\n  calibration: {fraction: 1.0}\n"
    )
    files = ["--model", str(model), "--data", str(tmp_path / "d.yaml"), "--out", str(tmp_path / "q.onnx")]
    assert run(["compress", *files, "--target", "fixed-point-pow2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["breaches"]
    found = steps.lint(model=tmp_path / "q.onnx", target="fixed-point-pow2").findings
    assert told == [f.to_json() for f in found]
    assert ("unsupported-op", "norm") in {(b["rule"], b["where"]) for b in told}
    assert run(["compress", *files, "--target", "fixed-point-pow2"]) == 0
    shown = capsys.readouterr().out
    assert f"Not as fixed-point-pow2 wants it ({len(found)} findings" in shown
    assert "LayerNormalization" in shown.split("Not as")[1]
    assert run(["compress", *files, "--target", "npu-int8-symmetric"]) == 0
    assert "Not as" not in capsys.readouterr().out
    # a recipe that does not look at the target claims nothing about it
    assert run(["compress", *files, "--recipe", "float16", "--target", "fixed-point-pow2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["breaches"] == []
