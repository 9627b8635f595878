"""What the main path costs: pipeline overhead, memory of calibration, latency of int8. Prints a table and JSON.

`python benchmarks/main_path.py [--bench FOLDER] [--out results.json]`. Every figure is a ratio or a difference of two
measurements of the same run; absolute times depend on the machine, which is named. Without a folder of real models
(default: ../shared/bench) only the digits rows are measured.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from qcore import steps
from qcore.cli.workspace import Workspace, prepare
from qcore.demo.make_data import write_digits
from qcore.pipelines.local import TASKS, ReleaseArguments, run_release

MODELS = {
    "resnet8_cifar10": "cifar10",
    "efficientnet_lite0": "imagenet500_eff0",
    "mobilenetv2_100_224": "imagenet500",
}
PEAK = """
import sys
from pathlib import Path
from qcore import steps
steps.calibrate(model=Path(sys.argv[1]), data=Path(sys.argv[2]), out=Path(sys.argv[3]), split=sys.argv[4])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def pipeline_overhead(folder: Path) -> dict[str, float]:
    """Return the seconds of the seven steps called directly and through kfp.local, and the difference per task."""
    place = prepare(folder / "w", "stable")
    data = write_digits(folder / "data")
    model = folder / "digits.onnx"
    model.write_bytes(resources.files("qcore.demo").joinpath("digits_cnn.onnx").read_bytes())
    policy = folder / "policy.yaml"
    policy.write_text("top1: {max_drop: 0.02}\n")
    library_path(place, model, data, policy, "0")  # imports and caches: neither side pays for them
    direct = min(timed(library_path, place, model, data, policy, f"1.{k}") for k in range(3))

    def through_kfp(version: str) -> None:
        arguments = ReleaseArguments(
            model=model,
            data=data,
            policy=policy,
            family="digits",
            version=version,
            repository=place.repository,
            keys=place.keys,
        )
        run = run_release(arguments, workspace=place.runs, tracking_uri=place.tracking_uri)
        assert run.outcome == "pass", run.outcome

    through_kfp("2.0")
    piped = min(timed(through_kfp, f"2.{k}") for k in (1, 2, 3))
    return {"library_s": direct, "pipeline_s": piped, "overhead_per_task_s": (piped - direct) / len(TASKS)}


def library_path(place: Workspace, model: Path, data: Path, policy: Path, version: str) -> None:
    """Run the seven steps in this process."""
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        steps.prune(model=model, out=at / "p.onnx", sparsity=0.0)
        steps.calibrate(model=at / "p.onnx", data=data, out=at / "t.json")
        steps.quantize(model=at / "p.onnx", table=at / "t.json", out=at / "q.onnx")
        steps.evaluate(candidate=at / "q.onnx", baseline=model, data=data, out=at / "r.json")
        package = at / "p.qpkg"
        steps.package(model=at / "q.onnx", data=data, out=package, family="direct", version=version)
        gated = {"report": at / "r.json", "package": package, "policy": policy, "key": place.keys / "gate.pem"}
        steps.gate(**gated, out=at / "e.json")
        steps.publish(package=package, evidence=at / "e.json", repository=place.repository, keys=place.keys)


def timed(call: object, *arguments: object) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start


def calibration_memory(bench: Path, folder: Path) -> dict[str, float]:
    """Return the peak MiB of calibrating EfficientNet-Lite0 on 25, 100 and 400 images, each in a process of its own."""
    card = folder / "sizes.yaml"
    text = (bench / "imagenet500_eff0.yaml").read_text()
    text = text.replace("path: imagenet500\n", f"path: {bench / 'imagenet500'}\n")
    text = text.replace("classes: imagenet_synsets.txt", f"classes: {bench / 'imagenet_synsets.txt'}")
    head = text.split("splits:")[0]
    card.write_text(head + "splits: {n25: {range: [0, 25]}, n100: {range: [0, 100]}, n400: {range: [0, 400]}}\n")
    peaks = {}
    for split in ("n25", "n100", "n400"):
        command = [sys.executable, "-c", PEAK, str(bench / "models/efficientnet_lite0.onnx"), str(card)]
        done = subprocess.run([*command, str(folder / "t.json"), split], capture_output=True, check=True, text=True)
        peaks[f"{split}_MiB"] = int(done.stdout) / 1024
    return {**peaks, "ratio_400_to_25": peaks["n400_MiB"] / peaks["n25_MiB"]}


def int8_against_float(bench: Path, folder: Path, name: str) -> dict[str, float]:
    """Return drop, agreement, and the ratios of latency and size of the default int8 recipe for this machine."""
    model, data, out = bench / f"models/{name}.onnx", bench / f"{MODELS[name]}.yaml", folder / "q.onnx"
    seconds = timed(lambda: steps.compress(model=model, data=data, out=out))
    report = steps.evaluate(candidate=out, baseline=model, data=data, out=folder / "r.json")
    return {
        "n": report.n,
        "float_top1": report.metrics["baseline_top1"],
        "int8_top1": report.metrics["top1"],
        "agreement": report.metrics["agreement"],
        "float_p50_ms": report.baseline.latency_ms.p50,
        "latency_ratio": report.model.latency_ms.p50 / report.baseline.latency_ms.p50,
        "size_ratio": report.model.size_bytes / report.baseline.size_bytes,
        "compress_s": seconds,
    }


def cpu() -> str:
    """Return what /proc/cpuinfo calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--bench", type=Path, default=root.parent / "shared" / "bench")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, object] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["pipeline_overhead"] = pipeline_overhead(folder)
        if (options.bench / "models").is_dir():
            results["calibration_memory"] = calibration_memory(options.bench, folder)
            for model in MODELS:
                results[model] = int8_against_float(options.bench, folder, model)
        else:
            print(f"{options.bench / 'models'} is not there: real models skipped", file=sys.stderr)
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
