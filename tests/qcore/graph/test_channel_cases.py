"""ONNX's own operator cases between two layers: channels that run through them are followed rightly, or stay."""

import warnings

import numpy as np
import onnx
import pytest
from channelled import pruned, random_keep, readers, run_all, with_dead
from onnx import TensorProto, helper, numpy_helper

from qcore.errors import QcoreError
from qcore.graph.channels import channel_groups
from qcore.graph.io import parse_model

SEEDS = 3


def cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [c for c in collect_testcases(None) if c.model is not None and c.data_sets]
    return [c for c in found if len(c.model.graph.node) == 1 and not c.model.functions]


def layer(name: str, rank: int, into: int, out: int, rng: np.random.Generator):
    """Return a layer over axis 1 of a tensor of `rank`, from `into` to `out` channels, and its weights."""
    w = rng.dirichlet(np.ones(into), out).astype(np.float32).reshape((out, into) + (1,) * max(rank - 2, 0))
    if rank == 2:
        return helper.make_node("Gemm", [f"{name}.in", f"{name}.w"], [f"{name}.out"], name=name, transB=1), w
    return helper.make_node("Conv", [f"{name}.in", f"{name}.w"], [f"{name}.out"], name=name), w


def wrapped(case, at: int, constants: bool) -> tuple[onnx.ModelProto, dict] | None:
    """Return the case's node reading a layer with its input `at`, read by a layer; other inputs as they are."""
    graph, rng = case.model.graph, np.random.default_rng(0)
    if not all(isinstance(a, np.ndarray | np.generic) for a in case.data_sets[0][0]):
        return None
    arrays = [np.asarray(a) for a in case.data_sets[0][0]]
    if len(arrays) != len(graph.input):
        return None
    x, wanted = arrays[at], case.data_sets[0][1][0]
    if not isinstance(wanted, np.ndarray) or any(a.dtype != np.float32 for a in (x, wanted)):
        return None
    if not all(2 <= a.ndim <= 5 and a.shape[1] > 0 for a in (x, wanted)) or x.shape[1] < 2:
        return None
    node = onnx.NodeProto()
    node.CopyFrom(graph.node[0])
    fed_name, first_output = graph.input[at].name, node.output[0]
    before, w1 = layer("before", x.ndim, x.shape[1], x.shape[1], rng)
    after, w2 = layer("after", wanted.ndim, wanted.shape[1], 2, rng)
    before.output[0], after.input[0] = fed_name, first_output
    others = {i.name: a for k, (i, a) in enumerate(zip(graph.input, arrays, strict=True)) if k != at}
    kept = {} if constants else others
    ports = [helper.make_tensor_value_info("before.in", TensorProto.FLOAT, x.shape)]
    ports += [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in kept.items()
    ]
    inits = {"before.w": w1, "after.w": w2, **(others if constants else {})}
    made = helper.make_graph(
        [before, node, after],
        "g",
        ports,
        [helper.make_tensor_value_info("after.out", TensorProto.FLOAT, (wanted.shape[0], 2, *wanted.shape[2:]))],
        [numpy_helper.from_array(a, n) for n, a in inits.items()],
    )
    proto = helper.make_model(made, opset_imports=case.model.opset_import, ir_version=10)
    return proto, {"before.in": rng.uniform(0.1, 0.9, x.shape).astype(np.float32), **kept}


def check(case, at: int, constants: bool) -> str | None:
    """Return the op type if channels before it were removed and nothing was lost."""
    built = wrapped(case, at, constants)
    if built is None:
        return None
    proto, fed = built
    try:
        channels = channel_groups(parse_model(proto.SerializeToString(), case.name))
        free = [g for g in channels.groups if g.name == "before"]
        plain = run_all(proto.SerializeToString(), fed)
    except (QcoreError, Exception) as e:  # noqa: BLE001 - the runtime does not have every operator
        assert "onnxruntime" in type(e).__module__ or isinstance(e, QcoreError), (case.name, e)  # noqa: PT017
        return None
    if (
        not free
        or not np.isfinite(plain[0]).all()
        or not np.array_equal(plain, run_all(proto.SerializeToString(), fed))
    ):
        return None
    for seed in range(SEEDS):
        keep = random_keep(channels, seed)
        dead = with_dead(proto, channels, keep, lambda place: place in readers(proto))
        want, got = run_all(dead.SerializeToString(), fed), run_all(pruned(dead, keep), fed)
        assert np.allclose(want, got, rtol=1e-3, atol=1e-4), (case.name, at, constants)
    return case.model.graph.node[0].op_type


@pytest.mark.slow
def test_channels_through_every_operator():
    followed = set()
    for case in cases():
        for at in range(len(case.model.graph.input)):
            for constants in (True, False):
                followed.add(check(case, at, constants))
    assert {"Add", "Clip", "Concat", "MaxPool", "Pad", "Split", "Transpose", "Squeeze", "Where"} <= followed
    assert not {"LRN", "Einsum", "GroupNormalization", "DepthToSpace", "MeanVarianceNormalization"} & followed
    assert len(followed) > 60
