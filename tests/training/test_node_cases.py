"""Every operator that the executor claims, on onnx's own node test cases; what is left out is named with its reason."""

import re
import warnings
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from onnx.backend.test.case.test_case import TestCase  # noqa: E402
from onnx.backend.test.loader import load_model_tests  # noqa: E402

from qcore.errors import ModelError  # noqa: E402
from qcore.training.executor import build_executor  # noqa: E402
from qcore.training.ops import OPERATORS  # noqa: E402
from qcore.training.tensors import torch_from_onnx  # noqa: E402

REFUSED = {
    r"_(to_)?(FLOAT8|FLOAT4|INT2|UINT2)|e8m0|e4m3fn|e5m2|float4e2m1|linear_u?int2": "types that are not trained",
    r"_to_U?INT4": "a cast to 4 bits wraps around, and its carrier does not",
    r"test_bitwise_not_3d": "uint16 is carried in int32, whose other bits a complement would show",
    r"test_equal_string": "strings are not trained",
    r"test_maxpool_with_argmax_2d_precomputed_strides": "indices in column-major order",
    r"test_resize_tf_crop_and_resize": "a crop by a region of interest",
}
RANDOM = {r"test_training_dropout(_default)?(_mask)?$": "the expected output is of numpy's random numbers, not torch's"}
CHECKED_BY_HAND = {"GlobalLpPool": "tests/training/test_opsets.py::test_global_lp_pool"}
"""Operators that onnx has no node case for -> the test against ONNX Runtime that stands in."""

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # their own resolution: 11 and 8 bits


def matches(table: dict[str, str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in table)


@cache
def cases() -> dict[str, list[TestCase]]:
    """The cases whose every operator is claimed, by the operator of their last node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx computes infinities on purpose
        loaded = load_model_tests(kind="node")
    found: dict[str, list[TestCase]] = {}
    for case in loaded:
        nodes = case.model.graph.node
        if all(node.op_type in OPERATORS and node.domain == "" for node in nodes):
            found.setdefault(nodes[-1].op_type, []).append(case)
    return found


def tensor(value: object) -> torch.Tensor:
    proto = value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(value))
    return torch_from_onnx(ir.serde.deserialize_tensor(proto))


def difference(case: TestCase) -> str | None:
    """What is wrong with the executor's outputs, or None."""
    executor = build_executor(ir.serde.deserialize_model(case.model)).eval()
    for given, expected in case.data_sets:
        feeds = {i.name: tensor(value) for i, value in zip(case.model.graph.input, given, strict=False)}
        with torch.no_grad():
            outputs = executor(feeds)
        for output, value in zip(case.model.graph.output, expected, strict=True):
            want, got = tensor(value), outputs[output.name]
            if (got.shape, got.dtype) != (want.shape, want.dtype):
                return f"{output.name}: {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
            loose = TOLERANCE.get(want.dtype, 1e-4)
            rtol, atol = max(loose, case.rtol or 0), max(loose / 10, case.atol or 0)
            if not torch.allclose(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True):
                return f"{output.name}: off by {(got.double() - want.double()).abs().max():g}"
    return None


@pytest.mark.parametrize("op_type", sorted(OPERATORS))
def test_cases_of(op_type: str) -> None:
    wrong = {}
    for case in cases().get(op_type, []):
        if matches(REFUSED, case.name):
            with pytest.raises(ModelError, match="cannot be trained"):
                build_executor(ir.serde.deserialize_model(case.model))
        elif not matches(RANDOM, case.name) and (found := difference(case)):
            wrong[case.name] = found
    assert wrong == {}


def test_every_operator_has_a_case_or_a_test_by_hand() -> None:
    run = {
        node.op_type
        for group in cases().values()
        for case in group
        if not matches(REFUSED | RANDOM, case.name) and len({n.op_type for n in case.model.graph.node}) == 1
        for node in case.model.graph.node
    }
    assert set(OPERATORS) - run == set(CHECKED_BY_HAND)
    assert len(OPERATORS) >= 80


def test_no_exclusion_is_idle() -> None:
    names = [case.name for group in cases().values() for case in group]
    assert [p for p in REFUSED | RANDOM if not any(re.search(p, name) for name in names)] == []
    assert sum(not matches(REFUSED | RANDOM, name) for name in names) >= 1350
