"""A model in pieces gives what the whole gives."""

import numpy as np
import onnx
import onnxruntime
import pytest
from models import conv_net, model_of
from onnx import TensorProto, helper

from qcore.data.dataset import Batch
from qcore.runtime import ort
from qcore.runtime.pieces import cut


def batch_of(x, index=0):
    x = x if isinstance(x, dict) else {"": x}
    n = len(next(iter(x.values())))
    return Batch(index=np.arange(index, index + n), x=x, y=None)


def collected(proto, names, batches, limit=1 << 30):
    result = []
    shapes = {k: v.shape[1:] for k, v in batches[0].x.items()}
    pieces = cut(proto.SerializeToString(), names, shapes, limit)
    for n, tensors in ort.piece_activations(ort.load_pieces(pieces), names, batches):
        if n:
            result.append((n, {}))
        result[-1][1].update({k: v.copy() for k, v in tensors.items()})
    return result


@pytest.mark.parametrize("limit", [1, 2000, 1 << 30])
def test_pieces_give_what_the_whole_gives(limit):
    proto = conv_net()
    names = ["x", *(o for node in proto.graph.node for o in node.output)]
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    made = list(cut(proto.SerializeToString(), names, {"": (3, 8, 8)}, limit))
    assert len(made) == (1 if limit > 2000 else len(made))
    assert len(made) > 1 or limit > 2000
    for piece in made:
        onnx.ModelProto.FromString(piece.model)
    samples = [batch_of(x[k : k + 1], k) for k in range(4)]
    got: list[dict] = []
    for n, tensors in ort.piece_activations(ort.load_pieces(made), names, samples):
        if n:
            got.append({})
        got[-1].update({k: v.copy() for k, v in tensors.items()})
    for node in proto.graph.node:
        proto.graph.output.extend(onnx.ValueInfoProto(name=o) for o in node.output if o != "y")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for k, tensors in enumerate(got):
        assert set(tensors) == set(names)
        assert np.array_equal(tensors["x"], x[k : k + 1])
        for output, value in zip(session.get_outputs(), session.run(None, {"x": x[k : k + 1]}), strict=True):
            assert np.allclose(tensors[output.name], value, rtol=1e-4, atol=1e-5), output.name


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_several_inputs_dynamic_shapes_and_integers(limit):
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Shape", ["r"], ["shape"]),
        helper.make_node("ReduceMax", ["r"], ["top"], keepdims=0),
        helper.make_node("Transpose", ["r"], ["t"], perm=[1, 0, 2]),
        helper.make_node("Mul", ["t", "top"], ["y"]),
    ]
    proto = model_of(
        nodes,
        {"w": np.eye(3, dtype=np.float32)},
        inputs={"a": ["N", "L", 3], "b": ["N", "L", 3]},
        outputs={"y": ["L", "N", 3]},
    )
    rng = np.random.default_rng(0)
    lengths = [4, 7, 7, 1]
    data = [{k: rng.standard_normal((1, n, 3)).astype(np.float32) for k in "ab"} for n in lengths]
    got = collected(proto, ["a", "s", "shape", "top", "t", "y"], [batch_of(x, k) for k, x in enumerate(data)], limit)
    assert [n for n, _ in got] == [1] * 4
    for x, (_, tensors) in zip(data, got, strict=True):
        s = x["a"] + x["b"]
        assert set(tensors) == {"a", "s", "top", "t", "y"}  # the shape is not float
        assert np.allclose(tensors["s"], s)
        assert np.allclose(tensors["top"], np.maximum(s, 0).max())
        assert tensors["top"].shape == ()
        assert np.allclose(tensors["y"], np.maximum(s, 0).transpose(1, 0, 2) * tensors["top"])


def test_rows_that_fill_up_a_fixed_batch_are_left_out():
    proto = conv_net(batch=4)
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    ((n, tensors),) = collected(proto, ["x", "r1", "y"], [batch_of(x)])
    assert n == 3
    assert {k: len(v) for k, v in tensors.items()} == {"x": 3, "r1": 3, "y": 3}


def test_a_graph_with_branches_stays_in_one_piece():
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["x"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)],
        )
        for op in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Add", ["a", "y"], ["z"]),
    ]
    proto = model_of(nodes, {"yes": np.array(True)}, inputs={"x": ["N", 4]}, outputs={"z": ["N", 4]})
    assert len(list(cut(proto.SerializeToString(), ["a", "y", "z"], {"": (4,)}, 1))) == 1
    ((_, tensors),) = collected(proto, ["a", "y", "z"], [batch_of(np.array([[-1, 2, -3, 4]], np.float32))])
    assert tensors["y"].tolist() == [[0, 2, 0, 4]]


def test_shapes_that_depend_on_values_are_not_written_over():
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("NonZero", ["r"], ["where"]),
        helper.make_node("Cast", ["where"], ["y"], to=TensorProto.FLOAT),
    ]
    proto = model_of(nodes, {}, inputs={"x": ["N", 300]}, outputs={"y": [2, "K"]})
    data = [np.where(np.arange(300) < k, 1, -1).astype(np.float32)[None] for k in (5, 250, 7)]
    made = list(cut(proto.SerializeToString(), ["y"], {"": (300,)}))
    runs = ort.piece_activations(ort.load_pieces(made), ["y"], [batch_of(x, k) for k, x in enumerate(data)])
    assert [tensors["y"].shape for _, tensors in runs] == [(2, 5), (2, 250), (2, 7)]


def test_activations_may_be_kept():
    proto = conv_net()
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    kept = list(ort.activations(proto.SerializeToString(), ["s", "y"], [batch_of(x[k : k + 1], k) for k in range(3)]))
    one = list(ort.activations(proto.SerializeToString(), ["s", "y"], [batch_of(x)]))
    assert np.allclose(np.concatenate([t["y"] for _, t in kept]), one[0][1]["y"], rtol=1e-4, atol=1e-5)
    assert list(ort.activations(proto.SerializeToString(), ["s"], [])) == []
