"""What a model costs: threads beside each other, fresh processes, kernels that saturate, the machine in words."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from models import conv_net, model_of
from onnx import helper
from quantizing import quantized, samples, written

from qcore.errors import ModelError
from qcore.machine import cpu_flags, machine_description
from qcore.runtime import ahead, first_answer, ort, starts
from qcore.runtime.saturation import only_signed, pairs_saturate


def numbered(n):
    for k in range(n):
        yield np.array([k]), {"x": np.full((1, 2), k, np.float32)}, None


def test_answers_come_in_the_order_of_the_batches_whoever_is_ready_first():
    rng = np.random.default_rng(0)

    def late(fed):
        time.sleep(rng.uniform(0, 0.005))
        return {"y": fed["x"] + 1}

    with ThreadPoolExecutor(4) as pool:
        source, (first, second) = ahead.run_ahead(pool, [late, lambda fed: {"y": -fed["x"]}], numbered(60))
        seen = [(int(i[0]), first({})["y"][0, 0], second({})["y"][0, 0]) for i, _, _ in source]
    assert seen == [(k, k + 1, -k) for k in range(60)]


def test_only_a_few_batches_are_read_ahead():
    read = []

    def source():
        for batch in numbered(200):
            read.append(batch)
            yield batch

    with ThreadPoolExecutor(2) as pool:
        again, _ = ahead.run_ahead(pool, [dict], source())
        for done, _ in enumerate(again, 1):
            assert len(read) - done <= 2 * ahead.runs_at_once() + 1


def test_a_model_that_fails_on_a_batch_says_so_where_the_batch_is_looked_at():
    def picky(fed):
        if fed["x"][0, 0] == 7:
            raise ModelError("seven")
        return fed

    with ThreadPoolExecutor(2) as pool:
        source, (answer,) = ahead.run_ahead(pool, [picky], numbered(20))
        for _ in range(7):
            next(source)
            answer({})
        next(source)
        with pytest.raises(ModelError, match="seven"):
            answer({})


def test_kernels_saturate_exactly_where_the_cpu_has_no_vnni():
    if not {"avx2"} & cpu_flags():
        pytest.skip("not an x86 CPU with AVX2: other kernels, none of which adds in 16 bits")
    assert pairs_saturate() == (not cpu_flags() & {"avx512_vnni", "avx_vnni"})


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("target", ["x86-vnni", "npu-int8-symmetric", "arm-dotprod"])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_every_form_can_be_judged_with_and_without_vnni(monkeypatch, target, form, saturate):
    """Signed QOperator files with a QGemm could not be loaded in the mode that x86 without VNNI needs."""
    raw, x = written(quantized(conv_net(), target, form=form)).SerializeToString(), samples(conv_net())
    plain = ort.on_samples(ort.load_as_written(raw))({"x": x})["y"]
    monkeypatch.setattr(ort, "pairs_saturate", lambda: saturate)
    exact = ort.on_samples(ort.load_exact(raw))({"x": x})["y"]
    if form == "qdq":
        np.testing.assert_allclose(exact, plain, atol=0.1 * np.abs(plain).max())
    assert only_signed(raw) == (target != "x86-vnni")


def test_one_unsigned_layer_is_no_signed_file():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    for kind in (np.int8, np.uint8):
        proto = model_of(
            nodes,
            {"s": np.array(0.1, np.float32), "z": np.array(0, kind)},
            inputs={"x": ["N", 4]},
            outputs={"y": ["N", 4]},
        )
        assert only_signed(proto.SerializeToString()) == (kind is np.int8)


def test_starts_are_timed_in_processes_of_their_own():
    raws = [conv_net(seed).SerializeToString() for seed in (0, 1)]
    fed = {"x": samples(conv_net(), 1)}
    found = starts.measure_starts(raws, [fed, fed], 2)
    assert [len(s.ms) for s in found] == [2, 2]
    assert all(0 < ms < 60_000 for s in found for ms in s.ms)
    if first_answer.resident("VmHWM") is not None:
        assert all(1 << 16 < s.peak_memory_bytes < 1 << 28 for s in found)


def test_a_larger_model_holds_more_memory():
    if first_answer.resident("VmHWM") is None:
        pytest.skip("/proc/self/status is not there: memory is measured on Linux only")

    def matrix(n):
        w = np.ones((n, n), np.float32)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        return model_of([node], {"w": w}, inputs={"x": ["N", n]}, outputs={"y": ["N", n]}).SerializeToString()

    raws, feds = [matrix(64), matrix(4096)], [{"x": np.ones((1, n), np.float32)} for n in (64, 4096)]
    small, large = (s.peak_memory_bytes for s in starts.measure_starts(raws, feds, 1))
    assert large - small > 4096 * 4096 * 4  # at least its weights


def test_a_model_that_cannot_be_started_is_refused_in_one_line():
    with pytest.raises(ModelError, match="cannot be started in a fresh process") as e:
        starts.measure_starts([b"no model"], [{"x": np.ones(1, np.float32)}], 1)
    assert "\n" not in str(e.value)


def test_in_turns_every_model_begins_equally_often():
    began, last = [], []

    def model(name):
        def predict(fed):
            if len(last) % 2 == 0:
                began.append(name)
            last.append(name)
            return {}

        return ort.Loaded(name=name, inputs=(), outputs=(), predict=predict, integer_io=ort.load(RAW).integer_io)

    columns = ort.timed_rounds([model("a"), model("b")], {}, budget_s=0, warmup=0, max_runs=20)
    assert [len(c) for c in columns] == [20, 20]
    assert began == ["a", "b"] * 10


RAW = conv_net().SerializeToString()


def test_the_machine_is_described_in_words():
    described = machine_description()
    assert {"cpu", "cores", "instructions", "system"} <= set(described)
    assert all(isinstance(v, str) and v for v in described.values())
    assert int(described["cores"]) >= 1
