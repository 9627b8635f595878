"""ONNX's own operator cases as odd graphs: each is refused in words, or quantized into a file that runs and is near."""

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from quantizing import TARGETS

from qcore.calibration import CalibrationTable, calibrate
from qcore.data.dataset import Batch
from qcore.errors import ModelError, QcoreError
from qcore.graph.fold import fold_batchnorm
from qcore.graph.io import check_model, parse_model, serialize_model
from qcore.lint import lint
from qcore.methods.quantize import QuantizeStep, quantize, tensors_to_calibrate
from qcore.numerics.error import sqnr_db
from qcore.runtime.ort import activations
from qcore.target import load_target

# Exponentials of numbers that differ by 10,000 in one tensor: eight bits cannot tell neighbours apart.
INSANE = "large_number"
FINDINGS_OF_REFUSED_NODES = {"float-island", "unsupported-op"}


@dataclass(frozen=True)
class Case:
    """One float model that runs: its inputs, its answers, and its calibration table."""

    name: str
    proto: onnx.ModelProto
    fed: dict[str, np.ndarray]
    want: list[object]
    table: CalibrationTable


def run(data: bytes, fed: dict[str, np.ndarray], level: ort.GraphOptimizationLevel) -> list[object]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, fed)


@functools.cache
def cases() -> tuple[Case, ...]:
    from onnx.backend.test.case.model import collect_testcases as of_models
    from onnx.backend.test.case.node import collect_testcases as of_nodes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [c for c in [*of_nodes(None), *of_models()] if c.model is not None and c.data_sets]
    return tuple(made for case in found if (made := usable(case)) is not None)


def usable(case) -> Case | None:
    """Return the case if it is of a supported opset, has a float input, and its float model runs on finite numbers."""
    arrays = case.data_sets[0][0]
    if not all(isinstance(a, np.ndarray) for a in arrays) or not any(a.dtype == np.float32 for a in arrays):
        return None
    fed = dict(zip([i.name for i in case.model.graph.input], arrays, strict=False))
    raw = case.model.SerializeToString()
    n = arrays[0].shape[0] if arrays[0].ndim else 1
    try:
        model = fold_batchnorm(parse_model(raw, case.name)).model
        batch = Batch(index=np.arange(n), x=fed, y=None)
        measured = activations(serialize_model(model), tensors_to_calibrate(model), [batch], threads=1)
        table = calibrate(measured, model_sha256="0" * 64, data_sha256="0" * 64)
    except QcoreError:
        return None
    want = run(raw, fed, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return Case(name=case.name, proto=case.model, fed=fed, want=want, table=table)


def near(want: object, got: object) -> bool:
    if not isinstance(want, np.ndarray) or want.dtype != np.float32 or want.size == 0 or not np.isfinite(want).all():
        return True
    return not want.any() or sqnr_db(want, got) > 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "form"), [(t, f) for t in TARGETS for f in ("qdq", "qoperator") if (t, f) != ("tensorrt", "qoperator")]
)
def test_every_case_is_refused_in_words_or_gives_a_good_file(target, form):
    profile, problems, quantized = load_target(target), [], 0
    for case in cases():
        model = fold_batchnorm(parse_model(case.proto.SerializeToString(), case.name)).model
        try:
            rewrite = quantize(model, QuantizeStep(ranges="min-max", form=form), profile, case.table)
        except ModelError:
            continue
        data = serialize_model(rewrite.model)
        check_model(data, case.name)
        quantized += 1
        for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
            got = run(data, case.fed, level)
            if INSANE not in case.name and not all(map(near, case.want, got)):
                problems.append(f"{case.name}: far from float at {level}, {rewrite.changed}")
        found = {f.rule for f in lint(parse_model(data, case.name), profile)}
        allowed = FINDINGS_OF_REFUSED_NODES if rewrite.skipped else set()
        if found - allowed:
            problems.append(f"{case.name}: findings {found}")
    assert problems == []
    assert quantized > 100
