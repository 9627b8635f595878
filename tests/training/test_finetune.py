"""Recipe steps that train, ONNX in and ONNX out: what structure survives, who teaches, what is refused."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from learning import CARD, blobs, small_net, write_blobs
from models import model_of, save
from onnx import helper, numpy_helper
from quantizing import constants, run

pytest.importorskip("torch", reason="the extra `train` is not installed")

from qcore import steps
from qcore.errors import ConfigError, DataError, ModelError, QcoreError
from qcore.graph.unfold import unfold_batchnorm
from qcore.recipe import RECIPES, load_recipe
from qcore.steps import CompressionSummary
from qcore.training import finetune as training

TARGET = "npu-int8-symmetric"
CLUSTERS = 6


class Folder:
    """A model, data and recipes in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = write_blobs(folder / "data")

    def compress(self, proto: onnx.ModelProto, *recipe: str, target: str = TARGET, name: str = "out.onnx"):
        """Return what a recipe of these steps makes of `proto`, and the summary."""
        model = save(proto, self.folder / "m.onnx")
        text = "name: test\nsteps:\n" + "".join(f"  - {{{step}}}\n" for step in recipe)
        (self.folder / "recipe.yaml").write_text(text)
        out = self.folder / name
        made = steps.compress(
            model=model, data=self.card, out=out, recipe=str(self.folder / "recipe.yaml"), target=target, device="cpu"
        )
        assert sorted(p.name for p in self.folder.iterdir()) == sorted({"data", "m.onnx", "recipe.yaml", name})
        return onnx.load(out), made


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


FINETUNE = "method: finetune, epochs: 2, batch: 32, learning_rate: 0.1, teacher_weight: 0"
QAT = "method: qat, epochs: 2, batch: 32, learning_rate: 0.02, teacher_weight: 0"
QUANTIZE = "method: quantize, per_channel: false"


def changed(proto: onnx.ModelProto, **weights: np.ndarray) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(weights[tensor.name], np.float32), tensor.name))
    return proto


def structured(kind: str) -> tuple[onnx.ModelProto, np.ndarray]:
    """Return a net whose filters have zeros, few values, or both, and the filters."""
    rng = np.random.default_rng(2)
    w = constants(small_net(channels=8))["w"]
    centres = np.sort(rng.standard_normal(CLUSTERS).astype(np.float32))
    if kind != "zeros":
        w = centres[np.abs(w[..., None] - centres).argmin(axis=-1)]
    if kind != "clusters":
        w = np.where(rng.random(w.shape) < 0.5, np.float32(0), w)
    return changed(small_net(channels=8), w=w), w


def wide_net() -> onnx.ModelProto:
    """Return conv, conv, pool, gemm with 32 channels: (N,1,6,6) -> (N,3)."""
    rng = np.random.default_rng(0)
    weights = {
        "w": (rng.standard_normal((32, 1, 3, 3)) * 0.3).astype(np.float32),
        "b": np.zeros(32, np.float32),
        "v": (rng.standard_normal((64, 32, 3, 3)) * 0.1).astype(np.float32),
        "c": np.zeros(64, np.float32),
        "wf": (rng.standard_normal((3, 64)) * 0.1).astype(np.float32),
        "bf": np.zeros(3, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "v", "c"], ["g"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["g"], ["s"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "wf", "bf"], ["y"], name="fc", transB=1),
    ]
    return model_of(nodes, weights, inputs={"x": ["N", 1, 6, 6]}, outputs={"y": ["N", 3]})


def trained_one(made: CompressionSummary):
    (step,) = [s for s in made.steps if s.epochs]
    assert step.kept, "nothing was learnt, so nothing is shown"
    return step


def partition(w: np.ndarray) -> np.ndarray:
    return np.unique(w, return_inverse=True)[1].reshape(-1)


@pytest.mark.parametrize("kind", ["zeros", "clusters", "both"])
def test_finetuning_keeps_zeros_and_shared_values(kind: str, folder: Folder) -> None:
    proto, w = structured(kind)
    after, made = folder.compress(proto, FINETUNE)
    trained_one(made)
    got = constants(after)["w"]
    assert not np.array_equal(got, w)
    if kind != "clusters":
        assert np.array_equal(got == 0, w == 0)
    if kind != "zeros":
        assert np.array_equal(partition(got), partition(w)) or len(np.unique(got)) == len(np.unique(w))
        for value in np.unique(w):
            assert len(np.unique(got[w == value])) == 1


def test_batch_norms_come_and_go_while_a_model_learns(folder: Folder) -> None:
    proto, w = structured("zeros")
    plain, _ = folder.compress(proto, FINETUNE)
    after, made = folder.compress(proto, f"{FINETUNE}, batch_norms: true")
    step = trained_one(made)
    assert [(n.op_type, list(n.input), list(n.output)) for n in after.graph.node] == [
        (n.op_type, list(n.input), list(n.output)) for n in proto.graph.node
    ]
    assert np.array_equal(constants(after)["w"] == 0, w == 0)
    assert not np.array_equal(constants(after)["w"], constants(plain)["w"])
    x, y = blobs()
    right = (run(after.SerializeToString(), x[192:]).argmax(axis=1) == y[192:]).mean()
    assert right == pytest.approx(step.epochs[step.best].accuracy)  # what was judged is what was written


@pytest.mark.parametrize(
    ("options", "used"), [("", True), (", batch: 8", False), (", batch_norms: false", False)], ids=str
)
def test_batch_norms_are_used_where_samples_and_batches_allow_it(
    options: str, used: bool, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(training, "FEWEST_LABELS", 100)
    monkeypatch.setattr(training, "unfold_batchnorm", lambda *a: opened.append(a) or unfold_batchnorm(*a))
    for kind in ("zeros", "clusters"):
        folder.compress(structured(kind)[0], f"method: finetune, epochs: 1{options or ', batch: 32'}")
    assert len(opened) == used  # never for shared values: folding would part them


@pytest.mark.parametrize("kind", ["zeros", "clusters", "both"])
@pytest.mark.parametrize("target", [TARGET, "x86-avx2"])
def test_quantization_aware_training_keeps_zeros_and_shared_values(kind: str, target: str, folder: Folder) -> None:
    proto, w = structured(kind)
    after, made = folder.compress(proto, QUANTIZE, QAT, target=target)
    trained_one(made)
    before, _ = folder.compress(proto, QUANTIZE, target=target)
    (name,) = [k for k, v in constants(after).items() if v.shape == w.shape]
    got, zero = constants(after)[name].astype(int), 128 if target == "x86-avx2" else 0
    assert not np.array_equal(got, constants(before)[name])
    if kind != "clusters":
        assert (got[w == 0] == zero).all()
    if kind != "zeros":
        assert len(np.unique(got)) <= len(np.unique(w))
        for value in np.unique(w):
            assert len(np.unique(got[w == value])) == 1


def test_structure_that_rounding_broke_is_put_right_by_training(folder: Folder) -> None:
    proto, w = structured("both")
    recipe = ("method: quantize, per_channel: false, weight_bits: 4", "method: round-weights, samples: 8", QAT)
    after, made = folder.compress(proto, *recipe)
    trained_one(made)
    (got,) = [v for v in constants(after).values() if v.shape == w.shape]
    assert not got[w == 0].any()
    assert all(len(np.unique(got[w == value])) == 1 for value in np.unique(w))


def test_structure_may_be_given_up(folder: Folder) -> None:
    after, _ = folder.compress(structured("both")[0], FINETUNE + ", keep_zeros: false, keep_clusters: false")
    assert len(np.unique(constants(after)["w"])) == 72  # all of them


def test_weights_in_constant_nodes_keep_their_zeros(folder: Folder) -> None:
    proto, w = structured("zeros")
    tensor = next(t for t in proto.graph.initializer if t.name == "w")
    node = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w))
    proto.graph.initializer.remove(tensor)
    proto.graph.node.insert(0, node)
    after, made = folder.compress(proto, FINETUNE)
    trained_one(made)
    got = next(n.attribute[0].t for n in after.graph.node if n.op_type == "Constant" and n.output[0] == "w")
    assert np.array_equal(numpy_helper.to_array(got) == 0, w == 0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("target", ["x86-avx2", "x86-vnni", "arm-dotprod", TARGET, "fixed-point-pow2", "tensorrt"])
def test_what_was_judged_is_what_is_written(target: str, bits: int, folder: Folder) -> None:
    after, made = folder.compress(small_net(channels=8), f"method: quantize, weight_bits: {bits}", QAT, target=target)
    step = trained_one(made)
    assert step.error_after == step.epochs[step.best].validation < step.error_before
    x, y = (np.load(folder.card.parent / "blobs.npz")[k][192:256] for k in "xy")
    coded = after.graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT
    if not coded:
        right = (run(after.SerializeToString(), x).argmax(axis=1) == y).mean()
        assert right == pytest.approx(step.epochs[step.best].accuracy, abs=0.05)  # ties of integer logits
    assert made.breaches == ()


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("target", ["x86-avx2", "x86-vnni", "arm-dotprod"])
def test_training_starts_from_the_very_model_that_it_is_given(target: str, bits: int, folder: Folder) -> None:
    proto = small_net(channels=8)
    teacher = run(proto.SerializeToString(), x := np.load(folder.card.parent / "blobs.npz")["x"][192:256])
    before = (f"method: quantize, weight_bits: {bits}", "method: round-weights")
    given, _ = folder.compress(proto, *before, target=target)
    lowest = min(int(v.min()) - (128 if v.dtype == np.uint8 else 0) for v in constants(given).values() if v.ndim > 1)
    assert bits == 8 or lowest == -(1 << (bits - 1))  # the level that rounding to nearest does not use
    made = run(given.SerializeToString(), x)
    p, q = (np.exp(z - np.log(np.exp(z).sum(axis=1, keepdims=True))) for z in (teacher, made))
    _, trained = folder.compress(proto, *before, "method: qat, epochs: 1, teacher_weight: 1", target=target)
    divergence = float((p * np.log(p / q)).sum(axis=1).mean())
    # Integer kernels and torch may round a tie to different sides: much less than what clipping loses.
    assert trained.steps[-1].epochs[0].validation == pytest.approx(divergence, rel=0.05, abs=2e-6)


def test_a_softmax_at_the_end_teaches_and_learns(folder: Folder) -> None:
    options = FINETUNE.replace("teacher_weight: 0", "teacher_weight: 0.5").replace("epochs: 2", "epochs: 8")
    _, made = folder.compress(small_net(softmax=True), options)
    assert trained_one(made).epochs[-1].accuracy > 0.5


def test_a_model_with_labels_does_not_teach_itself(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "FEWEST_LABELS", 100)
    losses = []
    for share in ("", ", teacher_weight: 0", ", teacher_weight: 0.5"):
        _, made = folder.compress(small_net(), f"method: finetune, epochs: 1, batch: 32, batch_norms: false{share}")
        losses.append(made.steps[0].epochs[0].validation)
    assert losses[0] == losses[1] > losses[2]


def test_much_accuracy_lost_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    good, _ = folder.compress(small_net(channels=8), FINETUNE.replace("epochs: 2", "epochs: 30"))
    step = "method: finetune, epochs: 2, batch: 32, learning_rate: 0.00001, teacher_weight: 0"
    folder.compress(good, f"{step}, sparsify: {{sparsity: 0.95, every: 1}}")
    assert "accuracy on the validation samples fell from" in caplog.text
    assert "train longer" in caplog.text


def test_without_labels_the_teacher_teaches(folder: Folder) -> None:
    folder.card = write_blobs(folder.folder / "data", labels=False)
    proto, _ = structured("zeros")
    teacher = save(small_net(channels=5, seed=4), folder.folder / "data" / "t.onnx")
    options = f"method: finetune, epochs: 2, batch: 32, learning_rate: 0.05, teacher: {teacher}"
    _, made = folder.compress(proto, options)
    step = trained_one(made)
    assert step.error_after < step.error_before / 2
    assert step.epochs[0].accuracy is None


def test_two_training_steps_follow_each_other(folder: Folder) -> None:
    _, made = folder.compress(small_net(), FINETUNE, "method: quantize", QAT)
    assert [len(s.epochs) for s in made.steps] == [3, 0, 3]
    assert made.steps[2].error_before == pytest.approx(made.steps[0].error_after, rel=0.3)


def renamed(proto: onnx.ModelProto, **names: str) -> onnx.ModelProto:
    for node in proto.graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
    for port in [*proto.graph.input, *proto.graph.output]:
        port.name = names.get(port.name, port.name)
    return proto


def test_another_teacher_may_have_other_names(folder: Folder) -> None:
    first = save(small_net(seed=9), folder.folder / "data" / "t.onnx")
    options = "method: finetune, epochs: 1, batch: 32, teacher_weight: 1, teacher: "
    plain, _ = folder.compress(small_net(), options + str(first))
    second = save(renamed(small_net(seed=9), x="image", y="scores"), folder.folder / "data" / "t.onnx")
    again, made = folder.compress(small_net(), options + str(second))
    trained_one(made)
    assert again.SerializeToString() == plain.SerializeToString()


def wide() -> onnx.ModelProto:
    node = helper.make_node("Gemm", ["f", "wf"], ["y"], name="fc", transB=1)
    nodes = [helper.make_node("Flatten", ["x"], ["f"], name="flatten"), node]
    w = {"wf": np.ones((4, 36), np.float32)}
    return model_of(nodes, w, inputs={"x": ["N", 1, 6, 6]}, outputs={"y": ["N", 4]})


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (wide, r"teacher's outputs 'y' has shape \(N, 4\), the student's 'y' \(N, 3\); allowed: the same"),
        (lambda: small_net(batch=1), "teacher insists on batches of 1; allowed: any number; export it with a symbolic"),
        (None, "t.onnx does not exist"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, says: str, folder: Folder) -> None:
    path = folder.folder / "data" / "t.onnx"
    if teacher is not None:
        save(teacher(), path)
    assert_refused(folder, ModelError, says, f"method: finetune, epochs: 1, teacher: {path}")


TRAINING_RECIPES = sorted(p.stem for p in RECIPES.glob("*.yaml") if load_recipe(p.stem).training_steps)


@pytest.mark.parametrize("name", TRAINING_RECIPES)
def test_shipped_recipes_train(name: str, folder: Folder) -> None:
    recipe = load_recipe(name)
    # Wide enough that there is something to remove, small enough that tens of epochs take a second.
    model = save(wide_net(), folder.folder / "m.onnx")
    seen: list[int] = []
    made = steps.compress(
        model=model,
        data=folder.card,
        out=folder.folder / "out.onnx",
        recipe=name,
        target=TARGET,
        device="cpu",
        on_epoch=lambda epoch: seen.append(epoch.number),
    )
    assert seen == [k for step in recipe.training_steps for k in range(step.epochs + 1)]
    written = constants(onnx.load(made.output))
    weights = [w for w in written.values() if w.ndim > 1 and w.dtype != np.int64]
    integers = [w for w in weights if w.dtype == np.int8]
    assert bool(integers) == (recipe.quantize_step is not None)
    if name == "int4-qat":
        assert all(np.abs(w.astype(int)).max() <= 8 for w in integers)
    if name.startswith("sparse50"):
        assert sum((w == 0).sum() for w in weights) >= round(0.5 * sum(w.size for w in weights))
    if name.startswith("cluster16"):
        assert max(np.unique(w).size for w in integers or weights) <= 16
    if name.startswith(("channels", "decomposed")):
        assert sum(w.size for w in weights) < sum(w.size for w in constants(onnx.load(model)).values() if w.ndim > 1)


def assert_refused(
    folder: Folder, kind: type[QcoreError], says: str, *recipe: str, proto: onnx.ModelProto | None = None
):
    with pytest.raises(kind, match=says) as e:
        folder.compress(proto or small_net(), *recipe)
    assert "\n" not in str(e.value)
    assert not list(folder.folder.glob("out.onnx*"))


@pytest.mark.parametrize(
    ("recipe", "kind", "says"),
    [
        (["method: qat"], ConfigError, "step qat mends a quantized model; put it behind quantize"),
        (["method: quantize", "method: finetune"], ConfigError, "step finetune follows quantize; allowed behind it"),
        (["method: quantize", QAT, "method: correct-bias"], ConfigError, "step correct-bias would undo qat"),
        (["method: quantize, form: qoperator", QAT], ConfigError, "step qat mends QDQ models; allowed: form: qdq"),
        (["method: finetune, epochs: 0"], ConfigError, "epochs"),
        (["method: finetune, epoch: 3"], ConfigError, "did you mean 'epochs'"),
        (
            ["method: finetune, train: trian"],
            DataError,
            "has no split 'trian'; allowed: calibration, train, validation",
        ),
        (["method: finetune, validation: none"], DataError, "has no split 'none'"),
        (["method: finetune, validation: train"], DataError, "share 160 samples, so training would judge itself"),
        (["method: finetune, features: [nothing]"], ModelError, "nothing"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(recipe, kind, says: str, folder: Folder) -> None:
    assert_refused(folder, kind, says, *recipe)


def test_overlapping_splits_are_refused(folder: Folder) -> None:
    folder.card.write_text(CARD.replace("validation: {range: [192, 256]}", "validation: {range: [190, 256]}"))
    assert_refused(folder, DataError, "splits 'train' and 'validation' of .*|share 2 samples", FINETUNE)


def test_what_evaluates_does_not_teach(folder: Folder) -> None:
    folder.card.write_text(CARD + "  evaluation: {range: [190, 256]}\n")
    assert_refused(
        folder, DataError, "splits 'train' and 'evaluation' share 2 samples, so the model would be", FINETUNE
    )
    assert_refused(folder, DataError, "share 66 samples", f"{FINETUNE}, train: evaluation")


def test_samples_of_one_class_do_not_judge(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    x, y = (np.load(folder.card.parent / "blobs.npz")[k] for k in "xy")
    last = np.concatenate([np.flatnonzero(y != 1), np.flatnonzero(y == 1)])  # stored by class, cut by place
    np.savez(folder.card.parent / "blobs.npz", x=x[last], y=y[last])
    _, made = folder.compress(small_net(), FINETUNE)
    assert trained_one(made).samples == 144  # of 160, the rest judges
    assert "'validation' of blobs holds class 1 only, which cannot judge; one sample in 10 of 'train'" in caplog.text
    _, made = folder.compress(small_net(), f"{FINETUNE}, validation: validation")
    assert made.steps[0].samples == 160  # it was asked for
    assert caplog.text.count("cannot judge") == 1


def test_labels_cannot_teach_where_there_are_none(folder: Folder) -> None:
    folder.card = write_blobs(folder.folder / "data", labels=False)
    says = r"teacher_weight is 0.0, but split 'train' of blobs has no labels; allowed: 1, or leave it out"
    assert_refused(folder, ModelError, says, FINETUNE)


def test_labels_that_the_model_does_not_have_are_refused(folder: Folder) -> None:
    x, y = (np.load(folder.card.parent / "blobs.npz")[k] for k in "xy")
    np.savez(folder.card.parent / "blobs.npz", x=x, y=y + 5)
    assert_refused(folder, ModelError, r"has class \d, the model tells 3 classes apart; allowed: 0 to 2", FINETUNE)


def test_a_fixed_batch_is_refused(folder: Folder) -> None:
    says = "insists on batches of 2; allowed for training: any number; export it with a symbolic first dimension"
    assert_refused(folder, ConfigError, says, FINETUNE, proto=small_net(batch=2))


def test_a_model_without_weights_is_refused(folder: Folder) -> None:
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    proto = model_of(nodes, {}, inputs={"x": ["N", 1, 6, 6]}, outputs={"y": ["N", 1]})
    assert_refused(folder, ModelError, "no float weights to train", FINETUNE, proto=proto)


def test_one_sample_cannot_teach_and_judge(folder: Folder) -> None:
    folder.card.write_text("name: blobs\npath: blobs.npz\nlayout: NCHW\nsplits:\n  train: {range: [0, 1]}\n")
    assert_refused(folder, DataError, "split 'train' has 1 sample; allowed: 2 or more, since some must judge", FINETUNE)


def test_without_splits_of_their_own_one_sample_in_ten_judges(folder: Folder, caplog) -> None:
    folder.card.write_text("name: blobs\npath: blobs.npz\nlayout: NCHW\nsplits:\n  calibration: {}\n")
    _, made = folder.compress(small_net(), FINETUNE)
    assert trained_one(made).samples == 231
    assert "blobs has no split 'train': 256 samples of 'calibration' are learnt from" in caplog.text


def two_outputs() -> onnx.ModelProto:
    """Return a net whose class scores `y` come with a second output `z` of the same features."""
    proto = small_net()
    w = np.random.default_rng(5).standard_normal((2, 4)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w, "wz"))
    proto.graph.node.append(helper.make_node("Gemm", ["f", "wz"], ["z"], name="second", transB=1))
    proto.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", 2]))
    return proto


def test_outputs_beside_the_classes_stay_what_they_are(folder: Folder) -> None:
    proto = two_outputs()
    after, made = folder.compress(proto, FINETUNE.replace("epochs: 2", "epochs: 30"))
    trained_one(made)
    x = blobs()[0]
    before, now = (onnx_run(p, x)["z"] for p in (proto, after))
    assert np.square(now - before).mean() < 0.05 * np.square(before).mean()
    assert not np.array_equal(constants(after)["w"], constants(proto)["w"])


def onnx_run(proto: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))


def test_a_state_that_is_an_input_is_refused_and_stays(folder: Folder) -> None:
    teacher = save(small_net(), folder.folder / "data" / "t")
    model = save(small_net(), folder.folder / "out.onnx.0.checkpoint")
    before = model.read_bytes()
    with pytest.raises(ConfigError, match="is also an input; inputs are never changed"):
        steps.finetune(
            model=model,
            data=folder.card,
            out=folder.folder / "out.onnx",
            how=steps.Finetuning(method="distill", teacher=str(teacher), epochs=1),
            device="cpu",
        )
    assert model.read_bytes() == before


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_of_other_floats_are_refused_by_name(kind: type, folder: Folder) -> None:
    rng = np.random.default_rng(0)
    onnx_kind = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    nodes = [
        helper.make_node(
            "Cast",
            [
                "x",
            ],
            ["h"],
            name="there",
            to=onnx_kind,
        ),
        helper.make_node("Flatten", ["h"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w"], ["m"], name="fc"),
        helper.make_node("Cast", ["m"], ["y"], name="back", to=onnx.TensorProto.FLOAT),
    ]
    weights = {"w": rng.standard_normal((36, 3)).astype(kind)}
    proto = model_of(nodes, weights, inputs={"x": ["N", 1, 6, 6]}, outputs={"y": ["N", 3]})
    says = f"weight 'w' is {np.dtype(kind).name}; allowed for training: float32"
    assert_refused(folder, ModelError, says, FINETUNE, proto=proto)


def test_labels_of_the_validation_split_are_looked_at(folder: Folder) -> None:
    x, y = (np.load(folder.card.parent / "blobs.npz")[k] for k in "xy")
    y[200] = 99
    np.savez(folder.card.parent / "blobs.npz", x=x, y=y)
    assert_refused(folder, ModelError, "split 'validation' of blobs has class 99", FINETUNE)


def test_a_teacher_of_unknown_shape_is_measured(folder: Folder) -> None:
    proto = wide()
    for dimension in proto.graph.output[0].type.tensor_type.shape.dim:
        dimension.dim_param = "K"
    path = save(proto, folder.folder / "data" / "t.onnx")
    says = r"'y' of the teacher has size \(4,\), the student's \(3,\); allowed: the same"
    assert_refused(folder, ModelError, says, f"method: finetune, epochs: 1, teacher: {path}")


@pytest.mark.parametrize("recipe", ["method: prune, exclude: [nowhere]", "method: prune-channels, exclude: [nowhere]"])
def test_layers_that_do_not_exist_cannot_be_excluded(recipe: str, folder: Folder) -> None:
    assert_refused(folder, ModelError, "exclude names node 'nowhere', which does not exist", recipe, FINETUNE)


@pytest.mark.parametrize(
    ("out", "says"), [("/proc/x.onnx", "output /proc/x.onnx cannot be written"), ("n" * 250, "File name too long")]
)
def test_what_cannot_be_written_is_refused_before_anything_runs(out: str, says: str, folder: Folder) -> None:
    model = save(small_net(), folder.folder / "m.onnx")
    with pytest.raises(QcoreError, match=says):
        steps.finetune(
            model=model,
            data=folder.card,
            out=folder.folder / out,
            how=steps.Finetuning(method="finetune", epochs=1),
            device="cpu",
            on_epoch=lambda epoch: pytest.fail("it trained"),
        )
