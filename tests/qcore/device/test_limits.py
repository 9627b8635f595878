"""A model that asks for all memory or never ends fails its test under the limits, and nothing else suffers."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from simulators import CPU, make_world, package_source, run_python

from qcore import steps
from qcore.device import limits
from qcore.device.config import SELFTEST, DeviceConfig
from qcore.device.trial import try_slot
from qcore.errors import ModelError, UpdateError
from qcore.release.admission import Allowance, admit
from qcore.release.package import build_package, unpack_package
from qcore.release.subject import opened_package

INT64 = TensorProto.INT64


def model_of(nodes: list[object], inputs: list[object], outputs: list[object], weights: dict[str, object]) -> bytes:
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def memory_bomb() -> tuple[bytes, dict[str, object]]:
    """Return a model that makes as many elements as its input says, and golden samples that ask for 64 GiB."""
    nodes = [
        helper.make_node("ConstantOfShape", ["x"], ["huge"]),  # the shape comes with the input: admission cannot see it
        helper.make_node("ReduceSum", ["huge"], ["y"], keepdims=0),
    ]
    x = helper.make_tensor_value_info("x", INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    return model_of(nodes, [x], [y], {}), {"input:x": np.array([1 << 34]), "output:y": np.zeros(1, np.float32)}


def endless_loop() -> tuple[bytes, dict[str, object]]:
    """Return a model whose Loop never ends."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["v", "one"], ["v_next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_next", TensorProto.FLOAT, [1]),
        ],
    )
    node = helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    weights = {"yes": np.bool_(True), "one": np.ones(1, np.float32)}
    return model_of([node], [x], [y], weights), {"input:x": np.ones(1, np.float32), "output:y": np.ones(1, np.float32)}


def slot_of(folder: Path, model: bytes, golden: dict[str, object]) -> Path:
    source = package_source(folder / "src")
    source.model.write_bytes(model)
    np.savez(source.golden, **golden)  # type: ignore[arg-type]  # arrays by name
    package = build_package(source, folder / "p.qpkg")
    unpack_package(package.path, folder / "slot")
    manifest = json.loads((folder / "slot" / "manifest.json").read_bytes())
    manifest["golden"]["n"] = 1
    (folder / "slot" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "slot"


def device(folder: Path, **changes: object) -> DeviceConfig:
    world = make_world(folder / "world")
    return world.device(selftest=SELFTEST, **changes)


def test_a_memory_bomb_is_admitted_but_ends_at_the_limit(tmp_path: Path) -> None:
    model, golden = memory_bomb()
    admit(model)  # nothing in the file tells how much it will ask for
    began = time.monotonic()
    verdict = try_slot(device(tmp_path, selftest_timeout_s=120), slot_of(tmp_path, model, golden))
    assert not verdict.good
    assert "exit 1" in verdict.reason
    assert any(word in verdict.reason for word in ("alloc", "memory", "Memory")), verdict.reason
    assert time.monotonic() - began < 60


def test_an_endless_loop_is_not_admitted_undeclared_and_ends_at_the_limit_declared(tmp_path: Path) -> None:
    model, golden = endless_loop()
    with pytest.raises(ModelError, match="control flow"):
        admit(model)
    admit(model, allowance=Allowance(control_flow=True))
    began = time.monotonic()
    verdict = try_slot(device(tmp_path, selftest_timeout_s=4), slot_of(tmp_path, model, golden))
    assert not verdict.good
    assert "no answer in 4 s" in verdict.reason or "exit -" in verdict.reason
    assert time.monotonic() - began < 40


def test_a_good_model_passes_under_the_limits(tmp_path: Path) -> None:
    unpack_package(build_package(package_source(tmp_path / "src"), tmp_path / "p.qpkg").path, tmp_path / "slot")
    verdict = try_slot(device(tmp_path), tmp_path / "slot")
    assert verdict.good
    assert json.loads(verdict.reason)["provider"] == CPU


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "card"),
    [
        ("resnet8_cifar10", "cifar10"),
        ("mobilenetv1_075_192", "imagenet500_192"),
        ("mobilenetv2_100_224", "imagenet500"),
        ("efficientnet_lite0", "imagenet500_eff0"),
    ],
)
def test_real_float_models_pass_under_the_default_limits(bench: Path, tmp_path: Path, model: str, card: str) -> None:
    """Twice the same package, admitted, and its self-test has room."""
    files = {"model": bench / "models" / f"{model}.onnx", "data": bench / f"{card}.yaml"}
    named = {"family": "real", "version": "1.0", "target": "x86-avx2"}
    packages = [steps.package(**files, **named, out=tmp_path / f"{k}.qpkg") for k in range(2)]
    assert packages[0].sha256 == packages[1].sha256
    with opened_package(packages[0].path) as opened:
        verdict = try_slot(device(tmp_path), opened.folder)
    assert verdict.good, verdict.reason


PROBE = "import resource as r; print([r.getrlimit(x) for x in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_CORE)]); exit(0)"


def test_the_limits_are_those_of_the_configuration_and_hard(tmp_path: Path) -> None:
    (tmp_path / "slot").mkdir()
    (tmp_path / "slot" / "model.onnx").write_bytes(bytes(1000))
    config = device(tmp_path, selftest_memory_mb=512, selftest_timeout_s=7.5)
    probe = (sys.executable, "-c", PROBE)

    def found(**changes: object) -> object:
        changed = dataclasses.replace(config, selftest=probe, **changes)  # type: ignore[arg-type]  # fields by name
        return json.loads(try_slot(changed, tmp_path / "slot").reason.replace("(", "[").replace(")", "]"))

    assert found() == [[512 << 20] * 2, [8, 8], [0, 0]]
    assert found(selftest_memory_mb=0) == [[(2048 << 20) + 3000] * 2, [8, 8], [0, 0]]


def test_a_command_that_is_missing_says_nothing_about_the_model(tmp_path: Path) -> None:
    (tmp_path / "slot").mkdir()
    (tmp_path / "slot" / "model.onnx").write_bytes(b"x")
    config = device(tmp_path)
    with pytest.raises(UpdateError, match=r"E_SELFTEST.*'/no/such' cannot be started: No such file.*mend `selftest`"):
        try_slot(dataclasses.replace(config, selftest=("/no/such",)), tmp_path / "slot")


def test_the_limiter_needs_nothing_of_qcore() -> None:
    code = f"import sys, runpy; runpy.run_path({limits.__file__!r}); print([m for m in sys.modules if 'qcore' in m])"
    assert run_python(["-I", "-S", "-c", code]).stdout.strip() == "[]"
