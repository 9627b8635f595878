"""Trials on files: models wait on disk within limits, and a kill leaves nothing behind that stays."""

from models import conv_net, save, write_data

from qcore import steps
from qcore.graph.io import read_model_bytes
from qcore.recipe import load_recipe
from qcore.steps import tries
from qcore.steps.costs import LATENCY
from qcore.steps.guard import silent


def bench_in(tmp_path, **more):
    proto = conv_net()
    card, model = write_data(tmp_path / "in", proto), save(proto, tmp_path / "m.onnx")
    options = {"split": "calibration", "judged_on": None, "target": "npu-int8-symmetric", "progress": silent}
    raw = read_model_bytes(model)
    return tries.open_bench(raw, "m", data=card, out=tmp_path / "q.onnx", **{**options, **more})


def test_old_models_make_room_and_are_made_again_when_chosen(tmp_path, monkeypatch):
    bench = bench_in(tmp_path)
    monkeypatch.setattr(tries, "KEPT_BYTES", 1)  # room for the newest only
    first, second = (tries.try_recipe(bench, load_recipe(name)) for name in ("int8", "int2-weights"))
    assert first.sha256 != second.sha256
    assert [p.stem for p in steps.models_path(bench.out).iterdir()] == [second.sha256]
    assert tries.sha256_bytes(tries.model_of(bench, first)) == first.sha256
    assert len(tries.model_of(bench, second)) == second.size_bytes


def test_what_a_kill_left_is_swept_and_a_stranger_stays(tmp_path):
    bench = bench_in(tmp_path)
    tries.try_recipe(bench, load_recipe("int8"))
    folder = steps.models_path(bench.out)
    (folder / f".{'0' * 64}.onnx.abc.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    tries.forget_models(bench)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    tries.forget_models(bench)
    assert not folder.exists()


def test_latency_is_measured_where_the_target_is_this_machine_or_somebody_asks(tmp_path):
    runs = {}
    for name, more in (("npu", {}), ("host", {"target": "host"}), ("asked", {"costing": LATENCY})):
        bench = bench_in(tmp_path / name, **more)
        tried = tries.try_recipe(bench, load_recipe("int8"))
        runs[name] = (bench.timed, tried.report.model.latency_ms.runs)
    assert runs["npu"] == (False, 1)
    assert all(runs[name][0] and runs[name][1] >= 20 for name in ("host", "asked"))


def test_the_name_of_a_recipe_makes_no_new_trial(tmp_path):
    bench = bench_in(tmp_path)
    recipe = load_recipe("int8")
    tries.try_recipe(bench, recipe)
    tries.try_recipe(bench, recipe.model_copy(update={"name": "another"}))
    assert len(steps.journal_path(bench.out).read_bytes().splitlines()) == 1
