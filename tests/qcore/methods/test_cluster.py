import numpy as np
import onnx
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from models import conv_net, model_of
from onnx import helper, numpy_helper

from qcore.config import check_config
from qcore.errors import ConfigError, ModelError
from qcore.graph.io import parse_model, serialize_model
from qcore.methods.cluster import ClusterStep, cluster
from qcore.methods.prune import PruneStep, prune
from qcore.recipe import Recipe, load_recipe


def weights_of(data):
    graph = onnx.ModelProto.FromString(data).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    return {n.name: constants[n.input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}


@given(st.integers(2, 40), st.integers(0, 9))
def test_at_most_so_many_values_and_each_the_nearest(clusters, seed):
    raw = conv_net(seed).SerializeToString()
    rewrite = cluster(parse_model(raw, "m"), ClusterStep(clusters=clusters))
    before, after = weights_of(raw), weights_of(serialize_model(rewrite.model))
    assert rewrite.changed == ("conv1", "depthwise", "pointwise", "fc")
    for name, w in after.items():
        values = np.unique(w)
        assert len(values) <= clusters
        nearest = np.abs(before[name][..., None] - values).min(axis=-1)
        np.testing.assert_allclose(np.abs(before[name] - w), nearest, atol=1e-6)


def test_the_argument_stays_bytes_repeat_and_packages_shrink():
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 64)).astype(np.float32)}
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], weights,
                     inputs={"x": ["N", 64]}, outputs={"y": ["N", 64]})  # fmt: skip
    model = parse_model(proto.SerializeToString(), "m")
    before = serialize_model(model)
    one, two = (serialize_model(cluster(model, ClusterStep()).model) for _ in range(2))
    assert serialize_model(model) == before
    assert one == two
    onnx.checker.check_model(onnx.ModelProto.FromString(one), full_check=True)
    sizes = [len(zstandard.ZstdCompressor(level=19).compress(x)) for x in (before, one)]
    assert sizes[1] < 0.25 * sizes[0]  # four bits of 32 would be an eighth


@pytest.mark.parametrize("keep", ["auto", True, False])
def test_zeros_of_pruned_weights_stay_zeros(keep):
    sparse = prune(parse_model(conv_net().SerializeToString(), "m"), PruneStep(sparsity=0.5)).model
    made = cluster(sparse, ClusterStep(clusters=2, keep_zeros=keep)).model
    before, after = weights_of(serialize_model(sparse)), weights_of(serialize_model(made))
    same = all(np.array_equal(before[k] == 0, after[k] == 0) for k in before)
    assert same == (keep is not False)
    assert all(len(np.unique(w)) <= 2 for w in after.values())


def test_dense_weights_need_no_zero():
    made = cluster(parse_model(conv_net().SerializeToString(), "m"), ClusterStep(clusters=4)).model
    assert all(np.all(w != 0) for w in weights_of(serialize_model(made)).values())
    forced = cluster(parse_model(conv_net().SerializeToString(), "m"), ClusterStep(clusters=4, keep_zeros=True)).model
    assert all(len(np.unique(w)) <= 3 for w in weights_of(serialize_model(forced)).values())


def test_shared_weights_are_clustered_once_and_refusals_have_reasons():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="two"),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="kept"),
        helper.make_node("MatMul", ["c", "x"], ["y"], name="dynamic"),
    ]
    weights = {"w": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)}
    proto = model_of(nodes, weights, inputs={"x": [4, 4]}, outputs={"y": [4, 4]})
    rewrite = cluster(parse_model(proto.SerializeToString(), "m"), ClusterStep(clusters=2, exclude=("kept",)))
    assert rewrite.changed == ("one", "two")
    assert {s.node: s.reason for s in rewrite.skipped} == {
        "kept": "excluded by the recipe",
        "dynamic": "its weights are not float constants",
    }
    graph = onnx.ModelProto.FromString(serialize_model(rewrite.model)).graph
    assert sorted(i.name for i in graph.initializer) == ["w", "w_clustered"]


def test_what_cannot_be_done_is_refused():
    model = parse_model(conv_net().SerializeToString(), "m")
    with pytest.raises(ModelError, match="exclude names node 'nobody', which does not exist"):
        cluster(model, ClusterStep(exclude=("nobody",)))
    bare = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, inputs={"x": [4]}, outputs={"y": [4]})
    with pytest.raises(ModelError, match="no layer can be clustered"):
        cluster(parse_model(bare.SerializeToString(), "m"), ClusterStep())
    nan = {"w": np.full((2, 2), np.nan, np.float32)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="bad")
    broken = model_of([node], nan, inputs={"x": [2, 2]}, outputs={"y": [2, 2]})
    with pytest.raises(ModelError, match="bad has weights that are NaN or infinite"):
        cluster(parse_model(broken.SerializeToString(), "m"), ClusterStep())
    for wrong in (1, 257):
        with pytest.raises(ConfigError, match="clusters"):
            check_config({"name": "r", "steps": [{"method": "cluster", "clusters": wrong}]}, Recipe, "recipe")
    assert load_recipe("cluster16").steps[-1] == ClusterStep(clusters=16)
