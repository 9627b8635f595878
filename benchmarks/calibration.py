"""What calibration costs against plain inference and against onnxruntime's own calibrators. Prints JSON.

`python benchmarks/calibration.py [--bench FOLDER] [--images 300] [--more 1000] [--peer-images 60] [--rounds 3]`.
Every measurement is a process of its own: seconds of wall clock and of CPU from the first image to the last (imports
and loading of the model left out on all sides, analysis of the model reported beside it), and VmHWM, which for
calibration is the largest of the verb and of the processes it starts. Contenders take turns and the best round of each
counts, because the machine may be shared. Images are decoded by the same code on all sides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

MODEL, CARD = "models/efficientnet_lite0.onnx", "imagenet500_eff0.yaml"

COMMON = """
import json, resource, sys, time
from pathlib import Path
model, card, split = sys.argv[1:4]
def done(start, cpu, **more):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    own = resource.getrusage(resource.RUSAGE_SELF)
    facts = {"s": time.perf_counter() - start, "cpu_s": own.ru_utime + own.ru_stime - cpu}
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    facts["peak_MiB"] = max(int(status["VmHWM"].split()[0]), children) / 1024
    print(json.dumps({**facts, **more}))
def used():
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime
"""
PLAIN = (
    COMMON
    + """
import onnxruntime
from qcore.data.dataset import batches, open_dataset
data = open_dataset(Path(card), split)
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
start, cpu = time.perf_counter(), used()
for batch in batches(data, 1):
    session.run(None, {name: batch.x[""]})
done(start, cpu, n=data.n)
"""
)
OURS = (
    COMMON
    + """
from qcore import steps
began = time.perf_counter()
first = []
def progress(what, k, n):
    if not first:
        first.append((time.perf_counter(), used()))
table = steps.calibrate(model=Path(model), data=Path(card), out=Path(sys.argv[4]), split=split, progress=progress)
end = time.perf_counter()
done(*first[0], n=table.samples, tensors=len(table.stats), whole_s=end - began)
"""
)
PEER = (
    COMMON
    + """
import logging, tempfile
logging.disable(logging.WARNING)
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
from qcore.data.dataset import batches, open_dataset
data = open_dataset(Path(card), split)
class Reader(CalibrationDataReader):
    def __init__(self):
        self.it = batches(data, 1)
    def get_next(self):
        batch = next(self.it, None)
        return None if batch is None else {name: batch.x[""]}
import onnxruntime
name = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()[0].name
method = {"percentile": CalibrationMethod.Percentile, "entropy": CalibrationMethod.Entropy}[sys.argv[5]]
options = {"num_bins": 2048, "num_quantized_bins": 128} if sys.argv[5] == "entropy" else {}
with tempfile.TemporaryDirectory() as folder:
    calibrator = create_calibrator(
        model, augmented_model_path=folder + "/a.onnx", calibrate_method=method, extra_options=options
    )
    start, cpu = time.perf_counter(), used()
    calibrator.collect_data(Reader())
    calibrator.compute_data()
    done(start, cpu, n=data.n)
"""
)
SEARCH = (
    COMMON
    + """
from qcore.calibration import load_table
from qcore.numerics.affine import QScheme
from qcore.numerics.stats import RangeRule, range_from_stats
stats = list(load_table(Path(sys.argv[4])).stats.values())
stats = (stats * (100 // len(stats) + 1))[:100]
start, cpu = time.perf_counter(), used()
for s in stats:
    range_from_stats(s, RangeRule(kind=sys.argv[5]), QScheme(dtype="uint8"))
done(start, cpu, n=len(stats))
"""
)


def measured(code: str, *arguments: object) -> dict[str, float]:
    """Return what the process said of itself."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, check=False, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    facts: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return facts


def card_of(bench: Path, folder: Path, images: int, more: int, peer: int) -> Path:
    """Write a card with splits of the wanted numbers; beyond the images at hand they are linked under other names."""
    source, images_at = bench / "imagenet500", folder / "images"
    files = sorted(p.relative_to(source) for p in source.rglob("*.*") if p.is_file())
    for k in range(more):
        at = images_at / files[k % len(files)].parent / f"{k // len(files)}_{files[k % len(files)].name}"
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(source / files[k % len(files)])
    text = (bench / CARD).read_text().split("splits:")[0].replace("path: imagenet500\n", f"path: {images_at}\n")
    text = text.replace("classes: imagenet_synsets.txt", f"classes: {bench / 'imagenet_synsets.txt'}")
    splits = {"few": 100, "some": images, "many": more, "peer": peer}
    ranges = ", ".join(f"{name}: {{range: [0, {n}]}}" for name, n in splits.items())
    (folder / "card.yaml").write_text(f"{text}splits: {{{ranges}}}\n")
    return folder / "card.yaml"


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the smallest of each figure: what the others added is the machine's."""
    return {key: min(r[key] for r in rounds) for key in rounds[0]}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--bench", type=Path, default=root.parent / "shared" / "bench")
    parser.add_argument("--out", type=Path)
    for name, default in (("images", 300), ("more", 1000), ("peer-images", 60), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    model = o.bench / MODEL
    results: dict[str, object] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        card, table = card_of(o.bench, folder, o.images, o.more, o.peer_images), folder / "t.json"
        turns: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
        for _ in range(o.rounds):
            turns["plain"].append(measured(PLAIN, model, card, "some"))
            turns["ours"].append(measured(OURS, model, card, "some", table))
        plain, ours = best(turns["plain"]), best(turns["ours"])
        sizes = {100: "few", o.more: "many"}
        peaks = {n: measured(OURS, model, card, split, folder / "u.json")["peak_MiB"] for n, split in sizes.items()}
        peers = {m: measured(PEER, model, card, "peer", table, m) for m in ("percentile", "entropy")}
        same = measured(OURS, model, card, "peer", folder / "u.json")
        searches = {m: measured(SEARCH, model, card, "some", table, m) for m in ("entropy", "mse", "sqnr")}
    results |= {
        "rounds": turns,
        "peers": peers,
        "time_ratio_to_plain": ours["s"] / plain["s"],
        "time_ratios_by_round": [a["s"] / b["s"] for a, b in zip(turns["ours"], turns["plain"], strict=True)],
        "cpu_ratio_to_plain": ours["cpu_s"] / plain["cpu_s"],
        "peak_ratio_to_plain": ours["peak_MiB"] / plain["peak_MiB"],
        "peak_MiB": {"plain": plain["peak_MiB"], "ours": ours["peak_MiB"], "by_images": peaks},
        "peer_time_over_ours": {k: v["s"] / same["s"] for k, v in peers.items()},
        "peer_cpu_over_ours": {k: v["cpu_s"] / same["cpu_s"] for k, v in peers.items()},
        "peer_peak_over_ours": {k: v["peak_MiB"] / ours["peak_MiB"] for k, v in peers.items()},
        "search_100_tensors_s": {k: {"wall": v["s"], "cpu": v["cpu_s"]} for k, v in searches.items()},
    }
    text = json.dumps(results, indent=2)
    print(text)
    if o.out:
        o.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
