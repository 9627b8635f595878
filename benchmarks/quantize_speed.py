"""What `qcore quantize` costs on long chains, and how fast its files run, beside onnxruntime.quantization in one run.

`chain`: the whole command line, from model and calibration table to the written file, on Conv/Relu chains of 8x4x4
maps; the peer is `quantize_static` per channel on the shortest. Wall and CPU seconds: on a busy machine only the latter
say something. `latency`: every bench model as the target's file and as the best one the peer makes (uint8 activations,
int8 weights per channel, after its own pre-processing), same calibration images, single thread, calls in turns.

    python benchmarks/quantize_speed.py [--bench FOLDER] [--target x86-vnni] [--out results.json]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
from main_path import cpu
from onnx import helper, numpy_helper

from qcore import steps
from qcore.data.dataset import batches, open_dataset
from qcore.runtime import ort

NODES = (500, 1000, 2000)
IMAGES = 8
CARD = """name: images
path: {path}
task: none
inputs: {inputs}
splits: {{calibration: {{range: [0, {n}]}}}}
"""
MODELS = {
    "resnet8_cifar10": "cifar10",
    "resnet8large_cifar10": "cifar10",
    "mobilenetv1_075_192": "imagenet500_192",
    "mobilenetv2_100_224": "imagenet500",
    "efficientnet_lite0": "imagenet500_eff0",
}
PEER = """
import sys, time, numpy as np
import onnxruntime.quantization as q
from onnxruntime.quantization.shape_inference import quant_pre_process
model, images, out, prepare = sys.argv[1:5]
if prepare == "yes":
    quant_pre_process(model, out + ".pre")
    model = out + ".pre"
class Reader(q.CalibrationDataReader):
    def __init__(self):
        arrays = np.load(images)
        self.left = iter([{k: arrays[k][i : i + 1] for k in arrays} for i in range(len(arrays[arrays.files[0]]))])
    def get_next(self):
        return next(self.left, None)
reader = Reader()
types = {"activation_type": q.QuantType.QUInt8, "weight_type": q.QuantType.QInt8}
q.quantize_static(model, out, reader, per_channel=True, **types)
"""


def chain(nodes: int) -> onnx.ModelProto:
    """Return a chain of Conv and Relu on 8 maps of 4x4: (N,8,4,4) -> (N,8,4,4)."""
    rng = np.random.default_rng(0)
    made, constants, x = [], [], "x"
    for k in range(nodes // 2):
        y = "y" if k == nodes // 2 - 1 else f"r{k}"
        w, b = rng.standard_normal((8, 8, 3, 3)) * 0.17, rng.standard_normal(8) * 0.1
        constants += [numpy_helper.from_array(v.astype(np.float32), f"{n}{k}") for n, v in (("w", w), ("b", b))]
        made.append(helper.make_node("Conv", [x, f"w{k}", f"b{k}"], [f"c{k}"], name=f"conv{k}", pads=[1, 1, 1, 1]))
        made.append(helper.make_node("Relu", [f"c{k}"], [y], name=f"relu{k}"))
        x = y
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 8, 4, 4]) for n in "xy"]
    graph = helper.make_graph(made, "chain", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def command(arguments: list[str]) -> dict[str, float]:
    """Return what one process costs in seconds: wall and CPU."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def chains(folder: Path, target: str) -> dict[str, object]:
    """Return the cost of `qcore quantize` on each chain, and that of the peer on the shortest."""
    np.savez(folder / "d.npz", x=np.random.default_rng(1).standard_normal((4, 8, 4, 4)).astype(np.float32))
    card = folder / "d.yaml"
    card.write_text(CARD.format(path="d.npz", inputs='{"x": "x"}', n=4))
    result: dict[str, object] = {}
    for nodes in NODES:
        model, table, out = (folder / f"{nodes}.{end}" for end in ("onnx", "json", "int8.onnx"))
        onnx.save(chain(nodes), model)
        steps.calibrate(model=model, data=card, out=table)
        arguments = ["-m", "qcore", "quantize", "--model", str(model), "--table", str(table), "--out", str(out)]
        result[str(nodes)] = min(
            (command([*arguments, "--target", target]) for _ in range(3)), key=lambda c: c["cpu_s"]
        )
    shortest = NODES[0]
    ours, out = result[str(shortest)], str(folder / "peer.onnx")
    theirs = command(["-c", PEER, str(folder / f"{shortest}.onnx"), str(folder / "d.npz"), out, "no"])
    result["peer"] = {"nodes": shortest, **theirs, "cpu_ratio": theirs["cpu_s"] / ours["cpu_s"]}  # type: ignore[index]
    return result


def latency(bench: Path, folder: Path, name: str, target: str) -> dict[str, object]:
    """Return median milliseconds of float, of the peer's file and of ours, and which operators only one of them has."""
    model = bench / f"models/{name}.onnx"
    raw = model.read_bytes()
    loaded = ort.load(raw, threads=1)
    images = islice(batches(open_dataset(bench / f"{MODELS[name]}.yaml", "calibration"), 1), IMAGES)
    fed = [ort.feeds(loaded, b) for b in images]
    np.savez(folder / "images.npz", **{k: np.concatenate([f[k] for f in fed]) for k in fed[0]})
    card = folder / "images.yaml"
    card.write_text(CARD.format(path="images.npz", inputs=json.dumps({k: k for k in fed[0]}), n=IMAGES))
    peer, table, ours = folder / "peer.onnx", folder / "t.json", folder / "ours.onnx"
    subprocess.run(
        [sys.executable, "-c", PEER, str(model), str(folder / "images.npz"), str(peer), "yes"],
        check=True,
        capture_output=True,
    )
    steps.calibrate(model=model, data=card, out=table)
    steps.quantize(model=model, table=table, out=ours, target=target)
    files = [raw, peer.read_bytes(), ours.read_bytes()]
    times = ort.measure_latency([ort.load(f, threads=1) for f in files], fed[0], budget_s=8, max_runs=1000)
    ops = [ort.optimized_ops(f) for f in files]
    return {
        **{f"{who}_ms": t.p50 for who, t in zip(("float", "peer", "ours"), times, strict=True)},
        "ours_to_peer": times[2].p50 / times[1].p50,
        "only_peer": dict(ops[1] - ops[2]),
        "only_ours": dict(ops[2] - ops[1]),
        "float_layers": sum(ops[2][k] for k in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul")),
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--bench", type=Path, default=root.parent / "shared" / "bench")
    parser.add_argument("--target", default="x86-vnni")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, object] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "target": options.target,
    }
    with tempfile.TemporaryDirectory() as name:
        results["chain"] = chains(Path(name), options.target)
        if (options.bench / "models").is_dir():
            for model in MODELS:
                results[model] = latency(options.bench.resolve(), Path(name), model, options.target)
        else:
            print(f"{options.bench / 'models'} is not there: real models skipped", file=sys.stderr)
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
