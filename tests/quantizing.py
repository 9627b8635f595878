"""Quantizing a test model in memory, and running what comes out."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from qcore.calibration import CalibrationTable, calibrate
from qcore.data.dataset import Batch
from qcore.graph.fold import fold_batchnorm
from qcore.graph.head import conv_head_to_gemm
from qcore.graph.io import parse_model, serialize_model
from qcore.graph.rewrite import Rewrite
from qcore.methods.quantize import QuantizeStep, quantize, tensors_to_calibrate
from qcore.runtime.ort import activations
from qcore.target import PROFILES, TargetProfile, load_target

TARGETS = sorted(p.stem for p in PROFILES.glob("*.yaml"))


def samples(proto: onnx.ModelProto, n: int = 64, seed: int = 5) -> np.ndarray:
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def table_of(proto: onnx.ModelProto) -> CalibrationTable:
    raw = proto.SerializeToString()
    names = tensors_to_calibrate(fold_batchnorm(parse_model(raw, "m")).model)
    batch = Batch(index=np.arange(64), x={"": samples(proto)}, y=None)
    return calibrate(activations(raw, names, [batch]), model_sha256="m" * 64, data_sha256="d" * 64)


def profile(shipped: str, **fields: object) -> TargetProfile:
    """Return the profile `shipped` with other fields."""
    return load_target(shipped).model_copy(update=fields)


def quantized(proto: onnx.ModelProto, target: str | TargetProfile, **options) -> Rewrite:
    model = conv_head_to_gemm(fold_batchnorm(parse_model(proto.SerializeToString(), "m")).model).model
    chosen = load_target(target) if isinstance(target, str) else target
    return quantize(model, QuantizeStep(**options), chosen, table_of(proto))


def written(rewrite: Rewrite) -> onnx.ModelProto:
    """Return the file of `rewrite`, which the checker takes."""
    proto = onnx.ModelProto.FromString(serialize_model(rewrite.model))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}


def run(data: bytes, x: np.ndarray, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def run_plain(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """Return what the file means: computed as written, nothing fused."""
    return run(proto.SerializeToString(), x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
