"""What an int8 file computes where pairs of products saturate, and whether the emulation is what real kernels do.

`python benchmarks/parity.py [--bench FOLDER] [--qemu qemu-x86_64]`: every model is quantized for x86-vnni, for x86-vnni
with `reduce_range`, and for x86-avx2, and `qcore parity` runs on some images. With `--qemu` (qemu-user 7.2 or newer,
which emulates AVX2 and neither AVX-512 nor VNNI) onnxruntime itself runs the same images there with the kernels that it
has for such a CPU, and its outputs are held against those of the reference executor.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from qcore import steps
from qcore.data.dataset import batches, open_dataset, some_samples
from qcore.runtime import ort
from qcore.runtime.reference import load_reference
from qcore.target import PROFILES

CARDS = {
    "resnet8_cifar10": "cifar10",
    "resnet8large_cifar10": "cifar10",
    "mobilenetv1_075_192": "imagenet500_192",
    "mobilenetv2_100_224": "imagenet500",
    "efficientnet_lite0": "imagenet500_eff0",
}
TARGETS = ("x86-vnni", "reduced", "x86-avx2")
BATCH = 8
EMULATED = f"""
import sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x, name = np.load(sys.argv[2]), session.get_inputs()[0].name
parts = [x[i : i + {BATCH}] for i in range(0, len(x), {BATCH})]
np.save(sys.argv[3], np.concatenate([session.run(None, {{name: part}})[0] for part in parts]))
"""


def on_avx2(qemu: str, model: Path, x: np.ndarray, folder: Path) -> np.ndarray:
    """Return the outputs of onnxruntime on a CPU that has AVX2 and no VNNI."""
    np.save(folder / "x.npy", x)
    command = [qemu, "-cpu", "max", sys.executable, "-c", EMULATED, str(model), str(folder / "x.npy")]
    subprocess.run([*command, str(folder / "y.npy")], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return np.load(folder / "y.npy")


def row(name: str, target: str, arguments: argparse.Namespace, folder: Path) -> str:
    card, model = arguments.bench / f"{CARDS[name]}.yaml", folder / f"{name}-{target}.onnx"
    profile = target
    if target == "reduced":
        profile = str(folder / "reduced.yaml")
        Path(profile).write_text((PROFILES / "x86-vnni.yaml").read_text() + "reduce_range: true\n")
    steps.compress(model=arguments.bench / f"models/{name}.onnx", data=card, out=model, target=profile)
    report = steps.parity(model=model, data=card, out=folder / "parity.json", samples=arguments.samples)
    found = {c.name: c for c in report.conditions}
    shown = (found[n] for n in ("optimizations-off", "exact-integers", "saturating-pairs"))
    cells = [name, target, f"{report.top1:.4f}"]
    cells += [f"{c.agreement:.4f}, {c.top1:.4f}, {c.sqnr_db:.1f} dB" for c in shown]
    cells.append(report.worst.name if report.worst else "none")
    if arguments.qemu:
        reference = load_reference(model.read_bytes(), saturate_pairs=True)
        chosen = some_samples(open_dataset(card, "evaluation"), arguments.samples)
        fed = [next(iter(ort.feeds(reference, b).values())) for b in batches(chosen, BATCH)]
        ours = np.concatenate([next(iter(reference.predict({reference.inputs[0].name: x}).values())) for x in fed])
        theirs = on_avx2(arguments.qemu, model, np.concatenate(fed), folder)
        right = np.mean(theirs.argmax(1) == np.array(chosen.labels))
        agreement = np.mean(theirs.argmax(1) == ours.argmax(1))
        cells.append(f"{right:.4f}; agreement {agreement:.4f}, largest difference {np.abs(theirs - ours).max():.3g}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, default=Path(__file__).resolve().parents[2] / "shared/bench")
    parser.add_argument("--models", default=",".join(CARDS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--qemu", help="the program qemu-x86_64")
    arguments = parser.parse_args()
    print("| model | target | as evaluated | off | exact integers | saturating pairs | worst | AVX2 kernels |")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models.split(","):
            for target in TARGETS:
                print(row(name, target, arguments, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
