"""Every quantizer on the same files: onnxruntime, nncf, AMD Quark, AIMET and qcore side by side.

`nice python benchmarks/quantizers.py [--bench FOLDER] [--models a,b] [--peers a,b] [--configs a,b] [--out FILE]`

Each peer runs in a virtual environment of its own, made under `--cache` from `peers/<name>.txt`, and in a fresh
process per file; what it is told and what it answers is in `peers/protocol.py`. All get the same calibration samples
(the card's `calibration` split, prepared by qcore.data) and are judged on the same evaluation samples by
qcore.evaluation. What a peer does not offer, or fails at, is a row that says so. Nothing is computed twice: quantized
files and measurements are kept under digests of all that they depend on; latency alone is measured anew, all files of
one model in turns.

Top-1 is given in *reference* arithmetic (onnxruntime without graph optimizations: exactly what the Q/DQ graph says)
and in *product* arithmetic (with all of them). They differ where an integer kernel does not do what the graph says:
the u8s8 kernels of x86 without VNNI saturate.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qcore.canonical import sha256_bytes, sha256_json
from qcore.cli.output import print_table
from qcore.data.dataset import batches, open_dataset
from qcore.evaluation import evaluate
from qcore.files import atomic_path, sha256_file, write_json
from qcore.numerics.bounds import paired_lower_bound
from qcore.runtime.ort import load, measure_latency

ROOT = Path(__file__).resolve().parents[1]
RUNNERS = Path(__file__).with_name("peers")
NOT_OFFERED = 4
BATCH = 16
MEASUREMENT = 1  # raise it when `measure` changes what it measures
MODELS = {
    "efficientnet_lite0": "imagenet500_eff0",
    "mobilenetv2_100_224": "imagenet500",
    "mobilenetv2_100_224_qat": "imagenet500",
    "mobilenetv1_075_192": "imagenet500_192",
    "resnet8_cifar10": "cifar10",
    "resnet8large_cifar10": "cifar10",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "pt-s8-symmetric": {"weights": "per-tensor", "weight_bits": 8, "activations": "int8", "symmetric": True},
    "pc-s8": {"weights": "per-channel", "weight_bits": 8, "activations": "int8", "symmetric": False},
    "pc-u8": {"weights": "per-channel", "weight_bits": 8, "activations": "uint8", "symmetric": False},
    "pc-w4-s8": {"weights": "per-channel", "weight_bits": 4, "activations": "int8", "symmetric": False},
}
HARD = ("pt-s8-symmetric", "pc-w4-s8")
"""Where recovery methods are worth their time."""


@dataclass(frozen=True)
class Variant:
    """One way to ask a peer: how it reads ranges, which recovery methods it applies; `hard_only` saves time."""

    name: str
    ranges: str = "default"
    recovery: tuple[str, ...] = ()
    hard_only: bool = True


@dataclass(frozen=True)
class Peer:
    """A quantizer: its runner, its pinned requirements (None: the current environment), and how it is asked."""

    name: str
    runner: Path
    requirements: Path | None
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Task:
    """One file to be made: the float model, the data card, who, what, how, and how long it may take."""

    model: Path
    card: Path
    peer: Peer
    config: str
    variant: Variant
    limit_s: float


def _peer(name: str, *variants: Variant) -> Peer:
    return Peer(name, RUNNERS / f"run_{name}.py", RUNNERS / f"{name}.txt", variants)


PEERS = (
    _peer(
        "onnxruntime",
        Variant("min-max", "min-max", hard_only=False),
        Variant("percentile", "percentile"),
        Variant("entropy", "entropy"),
    ),
    _peer(
        "nncf",
        Variant("plain"),
        Variant("fast-bc", recovery=("fast-bias-correction",), hard_only=False),
        Variant("bc", recovery=("bias-correction",)),
    ),
    _peer(
        "quark",
        Variant("min-max", "min-max", hard_only=False),
        Variant("cle", "min-max", ("cle",)),
        Variant("cle+bc", "min-max", ("cle", "bias-correction")),
        Variant("cle+adaround", "min-max", ("cle", "adaround")),
        Variant("cle+adaquant", "min-max", ("cle", "adaquant")),
    ),
    _peer(
        "aimet",
        Variant("min-max", "min-max", hard_only=False),
        Variant("cle", "min-max", ("cle",)),
        Variant("cle+seq-mse", "min-max", ("cle", "seq-mse")),
        Variant("cle+adaround", "min-max", ("cle", "adaround")),
    ),
    Peer(
        "qcore",
        RUNNERS / "run_qcore.py",
        None,
        (Variant("int8", hard_only=False), Variant("auto", recovery=("auto",), hard_only=False)),
    ),
)


class Skipped(Exception):  # noqa: N818
    """A peer that is not there, does not offer something, or fails; the message is the reason."""


def interpreter(peer: Peer, cache: Path) -> Path:
    """Return the Python of the peer's environment, made from its pinned requirements at the first call.

    Raises:
        Skipped: it cannot be installed.
    """
    if peer.requirements is None:
        return Path(sys.executable)
    folder = cache / "venvs" / f"{peer.name}-{sha256_file(peer.requirements)[:12]}"
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        print(f"making the environment of {peer.name} in {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        # The file names every package: --no-deps keeps the CUDA packages away that torch would ask for.
        pip = [sys.executable, "-m", "pip", "--python", python]
        command = [*pip, "install", "--quiet", "--no-deps", "-r", peer.requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Skipped(f"cannot be installed: {_last_line(done.stderr)}")
        (folder / ".complete").touch()
    return python


def quantized(task: Task, cache: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that the peer makes, and its figures (`version`, `seconds`, `peak_mib`, `import_mib`).

    Raises:
        Skipped: the peer is missing, does not offer the options, fails, or takes too long; kept as a result too.
    """
    python = interpreter(task.peer, cache)
    samples = calibration_samples(task.card, cache)
    options = {**CONFIGS[task.config], "ranges": task.variant.ranges, "recovery": list(task.variant.recovery)}
    key = {"model": sha256_file(task.model), "samples": sha256_file(samples), "options": options}
    folder = cache / "quantized" / sha256_json({**key, "peer": _identity(task.peer)})[:24]
    output, result, refused = folder / "model.onnx", folder / "result.json", folder / "skipped.json"
    before = json.loads(refused.read_text()) if refused.exists() else {"limit_s": 0.0}
    if before["limit_s"] >= task.limit_s > 0:
        raise Skipped(before["reason"])
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        paths = {"model": task.model, "samples": samples, "output": output, "result": result, "data": task.card}
        job = {**{k: str(v.resolve()) for k, v in paths.items()}, "options": options}
        reason = _run([python, task.peer.runner], job, folder, task.limit_s)
        if reason is None and not output.exists():
            reason = "it reported success and wrote no file"
        if reason is not None:
            result.unlink(missing_ok=True)
            refused.write_text(json.dumps({"reason": reason, "limit_s": task.limit_s}))
            raise Skipped(reason)
    return output, json.loads(result.read_text())


def _run(command: Sequence[Path], job: Mapping[str, Any], folder: Path, limit_s: float) -> str | None:
    """Run one job in a fresh process and an empty folder; return None, or why there is no result."""
    (folder / "job.json").write_text(json.dumps(job))
    with tempfile.TemporaryDirectory() as scratch, (folder / "log.txt").open("w") as log:
        started = subprocess.Popen(
            [*command, folder / "job.json"], cwd=scratch, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = started.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, 9)
            started.wait()
            return f"took more than {limit_s:.0f} s"
    if code == 0:
        return None
    reason = _last_line((folder / "log.txt").read_text(errors="replace"))
    return reason if code == NOT_OFFERED else f"failed (exit {code}): {reason}"


def _identity(peer: Peer) -> Any:
    """Return what a result of the peer depends on besides its job: its runner and its packages, or our own code."""
    files = [peer.runner, RUNNERS / "protocol.py"]
    if peer.requirements is None:
        tree = [p for p in sorted((ROOT / "qcore").rglob("*")) if p.suffix in (".py", ".yaml")]
        return [sha256_file(p) for p in [*files, *tree]]
    return [sha256_file(p) for p in [*files, peer.requirements]]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def calibration_samples(card: Path, cache: Path) -> Path:
    """Return the .npz of the prepared samples of the calibration split, `x` (n, ...) float32 in order."""
    data = open_dataset(card, "calibration")
    path = cache / "samples" / f"{data.sha256[:24]}.npz"
    if not path.exists():
        with atomic_path(path) as tmp, tmp.open("wb") as f:
            np.savez(f, x=np.concatenate([b.x[""] for b in batches(data, 50)]).astype(np.float32))
    return path


def evaluation_samples(card: Path, cache: Path) -> tuple[NDArray[np.float32], NDArray[np.int64], str]:
    """Return the prepared evaluation samples (n, ...), read from disk as they are used; labels (n,); their digest."""
    data = open_dataset(card, "evaluation")
    folder = cache / "samples" / data.sha256[:24]
    if not (folder / "y.npy").exists():
        parts = list(batches(data, 50))
        for name, array in (
            ("x", np.concatenate([b.x[""] for b in parts]).astype(np.float32)),
            ("y", np.array(data.labels, np.int64)),
        ):
            with atomic_path(folder / f"{name}.npy") as tmp, tmp.open("wb") as f:
                np.save(f, array)
    return np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy"), data.sha256


def outputs(model: Path, x: NDArray[np.float32], *, optimized: bool) -> NDArray[np.float32]:
    """Return the first output of `model` for `x`, (n, classes), with all or none of the runtime's optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others may need the cores
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [np.ascontiguousarray(x[k : k + BATCH]) for k in range(0, len(x), BATCH)]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts])


def measure(candidate: Path, baseline: Path, card: Path, cache: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of `candidate` against `baseline` in `reference` and `product` arithmetic; kept.

    Each holds `top1`, `delta`, `delta_low`, `delta_high` (95 %, Tango's score interval of paired rates), `agreement`,
    `output_sqnr_db` and `kl` (mean over samples of KL(softmax float || softmax candidate), nats).
    """
    x, y, digest = evaluation_samples(card, cache)
    key = [sha256_file(candidate), sha256_file(baseline), digest, ort.__version__, _cpu(), MEASUREMENT]
    path = cache / "measured" / f"{sha256_json(key)[:24]}.json"
    if not path.exists():
        float_key = [sha256_file(baseline), digest, ort.__version__, _cpu()]
        float_path = cache / "measured" / f"{sha256_json(float_key)[:24]}.npy"
        if not float_path.exists():
            with atomic_path(float_path) as tmp, tmp.open("wb") as f:
                np.save(f, outputs(baseline, x, optimized=True))
        theirs = np.load(float_path)
        arithmetic = {"reference": False, "product": True}
        write_json(path, {k: compared(outputs(candidate, x, optimized=v), theirs, y) for k, v in arithmetic.items()})
    return json.loads(path.read_text())


def compared(ours: NDArray[np.float32], theirs: NDArray[np.float32], y: NDArray[np.int64]) -> dict[str, float]:
    """Return the metrics of the logits `ours` against `theirs`, both (n, classes), with labels `y` (n,)."""

    def rows(logits: NDArray[np.float32]) -> Callable[[Mapping[str, Any]], dict[str, NDArray[np.float32]]]:
        return lambda fed: {"logits": logits[fed["row"]]}

    index = np.arange(len(y))
    result = evaluate(rows(ours), rows(theirs), [(index, {"row": index}, y)])
    assert result.paired is not None
    wins, losses = result.paired.only_candidate_right, result.paired.only_baseline_right
    p, q = _log_softmax(theirs), _log_softmax(ours)
    return {
        "top1": result.metrics["top1"],
        "delta": result.metrics["top1_delta"],
        "delta_low": paired_lower_bound(wins, losses, len(y), 0.975),
        "delta_high": -paired_lower_bound(losses, wins, len(y), 0.975),
        "agreement": result.metrics["agreement"],
        "output_sqnr_db": result.metrics["output_sqnr_db"],
        "kl": float(np.mean(np.sum(np.exp(p) * (p - q), axis=1))),
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def row(task: Task, cache: Path) -> dict[str, Any]:
    """Return the row of one task: what was asked, and either the figures or `skipped` with the reason."""
    asked = {
        "model": task.model.stem,
        "peer": task.peer.name,
        "config": task.config,
        "variant": asdict(task.variant),
    }
    try:
        output, figures = quantized(task, cache)
        measured = measure(output, task.model, task.card, cache)
    except Skipped as e:
        return {**asked, "skipped": str(e)}
    except Exception as e:  # noqa: BLE001 - the file of a peer may be anything; one bad file is one row
        return {**asked, "skipped": f"its file cannot be run: {' '.join(str(e).split())[:200]}"}
    return {**asked, "file": str(output), "size_bytes": output.stat().st_size, **figures, **measured}


def latencies(model: Path, rows: Sequence[dict[str, Any]], card: Path, cache: Path, budget_s: float) -> float:
    """Put `latency_ms` (median, batch 1, one thread, in turns) into each row with a file; return that of float."""
    made = [r for r in rows if "file" in r]
    x, _, _ = evaluation_samples(card, cache)
    loaded = [load(p.read_bytes(), threads=1) for p in (model, *(Path(r["file"]) for r in made))]
    times = measure_latency(loaded, {loaded[0].inputs[0].name: np.ascontiguousarray(x[:1])}, budget_s=budget_s)
    for r, latency in zip(made, times[1:], strict=True):
        r["latency_ms"] = latency.p50
    return times[0].p50


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Yield what the command line selects, in the order of the table."""
    for model in options.models:
        for config in options.configs:
            for peer in (p for p in PEERS if p.name in options.peers):
                for variant in peer.variants:
                    if config in HARD or not variant.hard_only:
                        files = (options.bench / f"models/{model}.onnx", options.bench / f"{MODELS[model]}.yaml")
                        yield Task(*files, peer, config, variant, options.limit)


COLUMNS = ("quantizer", "top-1", "delta [95 %]", "product", "agree", "dB", "KL", "MB", "s", "MiB", "ms")


def table_row(r: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the row as text; a row that was skipped says why."""
    name = f"{r['peer']} {r['variant']['name']}"
    if "skipped" in r:
        return (f"{name}: {r['skipped']}", *[""] * (len(COLUMNS) - 1))
    m = r["reference"]
    return (
        name,
        f"{100 * m['top1']:.2f}",
        f"{100 * m['delta']:+.2f} [{100 * m['delta_low']:+.1f}, {100 * m['delta_high']:+.1f}]",
        f"{100 * r['product']['delta']:+.2f}",
        f"{m['agreement']:.3f}",
        f"{m['output_sqnr_db']:.1f}",
        f"{m['kl']:.4f}",
        f"{r['size_bytes'] / 1e6:.2f}",
        f"{r['seconds']:.0f}",
        f"{r['peak_mib']:.0f}",
        f"{r['latency_ms']:.2f}" if "latency_ms" in r else "",
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(allowed)
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
        return [name for name in allowed if name in text.split(",")]

    return parse


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"models": list(MODELS), "peers": [p.name for p in PEERS], "configs": list(CONFIGS)}
    for key, allowed in names.items():
        parser.add_argument(f"--{key}", type=_names(allowed), default=allowed, help="comma separated; all by default")
    parser.add_argument("--bench", type=Path, default=ROOT.parent / "shared" / "bench")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "qcore-bench")
    parser.add_argument("--limit", type=float, default=900, help="seconds that one quantization may take")
    parser.add_argument("--latency", type=float, default=20, help="seconds of timing per model; 0: none")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print a table per model and configuration, and write everything as JSON."""
    options = arguments()
    if not (options.bench / "models").is_dir():
        sys.exit(f"{options.bench / 'models'} is not there; allowed: a folder of models and cards; pass --bench")
    results: dict[str, Any] = {"machine": f"{_cpu()}, {os.cpu_count()} cores", "models": {}}
    for model in options.models:
        start = time.perf_counter()
        rows = []
        for task in (t for t in tasks(options) if t.model.stem == model):
            rows.append(row(task, options.cache))
            print(f"{model} {task.config}: {' | '.join(filter(None, table_row(rows[-1])))}", file=sys.stderr)
        files = (options.bench / f"models/{model}.onnx", options.bench / f"{MODELS[model]}.yaml")
        facts: dict[str, Any] = {"rows": rows}
        if options.latency:
            timed = partial(latencies, budget_s=options.latency)
            facts["float_latency_ms"] = timed(files[0], rows, files[1], options.cache)
        facts["float_sha256"] = sha256_bytes(files[0].read_bytes())
        results["models"][model] = facts
        for config in options.configs:
            chosen = [table_row(r) for r in rows if r["config"] == config]
            print_table(f"{model}, {config} ({time.perf_counter() - start:.0f} s so far)", COLUMNS, chosen)
    if options.out:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
