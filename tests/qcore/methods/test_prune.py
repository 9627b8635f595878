import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import conv_net, model_of
from onnx import helper, numpy_helper

from qcore.errors import ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.prune import PruneStep, prune


def weights_of(data: bytes) -> dict[str, np.ndarray]:
    graph = onnx.ModelProto.FromString(data).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    return {n.name: constants[n.input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm")}


@given(st.floats(0, 0.99), st.integers(0, 20))
def test_exactly_the_asked_number_of_the_smallest_weights_goes(sparsity, seed):
    raw = conv_net(seed).SerializeToString()
    model = parse_model(raw, "m")
    rewrite = prune(model, PruneStep(sparsity=sparsity))
    before, after = weights_of(raw), weights_of(serialize_model(rewrite.model))
    assert rewrite.changed == ("conv1", "depthwise", "pointwise", "fc")
    for name, w in before.items():
        gone = (after[name] == 0) & (w != 0)
        assert gone.sum() == round(sparsity * w.size)
        assert np.array_equal(after[name][~gone], w[~gone])
        if gone.any() and not gone.all():
            assert np.abs(w[gone]).max() <= np.abs(w[~gone]).min()


def test_the_argument_is_not_changed_and_bytes_repeat():
    model = parse_model(conv_net().SerializeToString(), "m")
    before = serialize_model(model)
    first = serialize_model(prune(model, PruneStep(sparsity=0.5)).model)
    assert serialize_model(model) == before
    assert serialize_model(prune(model, PruneStep(sparsity=0.5)).model) == first
    onnx.checker.check_model(onnx.ModelProto.FromString(first), full_check=True)


def test_excluded_and_dynamic_layers_are_left_alone_with_the_reason():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="kept"),
        helper.make_node("MatMul", ["a", "x"], ["y"], name="dynamic"),
        helper.make_node("MatMul", ["y", "w"], ["z"], name="pruned"),
    ]
    proto = model_of(
        nodes, {"w": np.arange(16, dtype=np.float32).reshape(4, 4)}, inputs={"x": [4, 4]}, outputs={"z": [4, 4]}
    )
    rewrite = prune(parse_model(proto.SerializeToString(), "m"), PruneStep(exclude=("kept",)))
    assert rewrite.changed == ("pruned",)
    assert [(s.node, s.reason) for s in rewrite.skipped] == [
        ("kept", "excluded by the recipe"),
        ("dynamic", "its weights are not float constants"),
    ]


def test_a_model_without_layers_is_refused():
    proto = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, inputs={"x": [4]}, outputs={"y": [4]})
    with pytest.raises(ModelError, match="no layer can be pruned"):
        prune(parse_model(proto.SerializeToString(), "m"), PruneStep())
