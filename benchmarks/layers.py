"""What the layer report costs: time and peak memory at 32 and 128 images, beside onnxruntime's own layer debugger.

`python benchmarks/layers.py [--bench FOLDER] [--model NAME] [--out results.json]`. Each row is a process of its own,
run one after the other on the same files. The peer is `qdq_loss_debug.collect_activations` of onnxruntime on both
models, as its documentation shows; it keeps every activation of every image, so it gets 8 and 32 images only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from qcore import steps

CARDS = {"efficientnet_lite0": "imagenet500_eff0", "mobilenetv2_100_224": "imagenet500", "resnet8_cifar10": "cifar10"}
OURS = """
import sys
from pathlib import Path
from qcore import steps
q, f, card, n, out = sys.argv[1:6]
steps.layers(model=Path(q), baseline=Path(f), data=Path(card), out=Path(out), samples=int(n))
"""
ORT = """
import sys
from pathlib import Path
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.qdq_loss_debug import (
    collect_activations, compute_activation_error, create_activation_matching, modify_model_output_intermediate_tensors
)
from qcore.data.dataset import batches, open_dataset, some_samples
from qcore.graph.io import load_model
q, f, card, n, out = sys.argv[1:6]
name = load_model(Path(f)).graph.inputs[0].name

class Reader(CalibrationDataReader):
    def __init__(self):
        self.batches = batches(some_samples(open_dataset(Path(card), "evaluation"), int(n)), 1)
    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {name: batch.x[""]}

collected = []
for path in (f, q):
    augmented = str(Path(out).with_suffix(".onnx"))
    modify_model_output_intermediate_tensors(path, augmented)
    collected.append(collect_activations(augmented, Reader()))
errors = compute_activation_error(create_activation_matching(collected[1], collected[0]))
"""
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def measured(code: str, *arguments: object) -> dict[str, float]:
    """Return the seconds and the peak megabytes of `code` in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code + PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"seconds": time.perf_counter() - start, "peak_mb": int(done.stdout.split()[-1]) / 1024}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--bench", type=Path, default=root.parent / "shared" / "bench")
    parser.add_argument("--model", choices=sorted(CARDS), default="efficientnet_lite0")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, card = options.bench / f"models/{options.model}.onnx", options.bench / f"{CARDS[options.model]}.yaml"
    results: dict[str, object] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "model": options.model,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantized = folder / "q.onnx"
        steps.compress(model=model, data=card, out=quantized, target="x86-avx2")
        for who, code, counts in (("qcore layers", OURS, (32, 128)), ("onnxruntime qdq_loss_debug", ORT, (8, 32))):
            for n in counts:
                row = measured(code, quantized, model, card, n, folder / "report")
                results[f"{who}, {n} images"] = row
                print(f"{who}, {n} images: {row['seconds']:.1f} s, peak {row['peak_mb']:.0f} MB", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
