"""What evaluation costs beside bare onnxruntime over the same images: ratios in one run, a JSON object a model.

`python benchmarks/evaluation.py [--bench FOLDER] [--rounds N] [--card CARD]`. Bare is two InferenceSessions as they
come that run one after the other over batches that were prepared before, at the best batch size of 1, 8 and 32, with
nothing done to the outputs. Ours runs both models and counts, over batches that were prepared before (`prepared`) or
read and prepared meanwhile (`ours`, to be held against bare plus the time of preparing). `cpu` is the CPU time of
sessions of one thread, which do not spin, over the CPU time of ours: that ratio holds on a busy machine too.
`standard` and `brief` are the wall clock of `qcore evaluate`; `bare command` imports, loads, prepares, and runs bare.

`--memory`: peak memory of `qcore evaluate` on the samples and on ten times as many.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import onnxruntime
import yaml

from qcore import steps
from qcore.data.dataset import Dataset, batches, open_dataset
from qcore.graph.io import read_model_bytes
from qcore.runtime import ahead, ort
from qcore.steps import judgement
from qcore.steps.costs import ONE_RUN
from qcore.steps.guard import silent

CARDS = {
    "resnet8_cifar10": "cifar10",
    "mobilenetv2_100_224": "imagenet500",
    "efficientnet_lite0": "imagenet500_eff0",
}
SIZES = (1, 8, 32)
MEMORY = """
import sys
from pathlib import Path
from qcore import steps
from qcore.steps.costs import LATENCY
m, b, d, o = map(Path, sys.argv[1:])
steps.evaluate(candidate=m, baseline=b, data=d, out=o, costing=LATENCY)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
BARE = """
import sys
import numpy as np, onnxruntime as ort
from pathlib import Path
from qcore.data.dataset import batches, open_dataset
model, baseline, card, size = sys.argv[1:]
sessions = [ort.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (model, baseline)]
for batch in batches(open_dataset(Path(card), "evaluation"), int(size)):
    x = batch.x[""].astype(np.float32)
    for session in sessions:
        session.run(None, {session.get_inputs()[0].name: x})
"""


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def timed(times: dict[str, list[float]], name: str, run: Callable[[], object]) -> None:
    cpu = time.process_time()
    times.setdefault(name, []).append(seconds(run))
    times.setdefault(f"{name} cpu", []).append(time.process_time() - cpu)


def finished(command: list[object]) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def bare(sessions: list[onnxruntime.InferenceSession], x: np.ndarray, size: int) -> None:
    for start in range(0, len(x), size):
        for session in sessions:
            session.run(None, {session.get_inputs()[0].name: x[start : start + size]})


def judge_of(baseline: bytes, data: Dataset) -> judgement.Judge:
    """Return what holds candidates against `baseline`, which runs anew each time."""
    return judgement.Judge(
        raw=baseline,
        dataset=data,
        costing=ONE_RUN,
        baseline=ort.load_exact(baseline, threads=ahead.threads_of_a_run()),
        answers=None,
        progress=silent,
        question=judgement.question_of(data, {}),
    )


def row(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    baseline, card = arguments.bench / f"models/{name}.onnx", arguments.bench / f"{CARDS[name]}.yaml"
    if arguments.card and CARDS[name] == "cifar10":
        card = arguments.card
    model, out = folder / f"{name}.q.onnx", folder / "report.json"
    steps.compress(model=baseline, data=card, out=model, target="host")
    data, files = open_dataset(card, "evaluation"), [read_model_bytes(p) for p in (model, baseline)]
    began = time.perf_counter()
    prepared = list(batches(data, judgement.EVALUATION_BATCH))
    preparing = time.perf_counter() - began
    x = np.concatenate([b.x[""] for b in prepared]).astype(np.float32)
    judge, candidate = judge_of(files[1], data), ort.load_exact(files[0], threads=ahead.threads_of_a_run())
    times: dict[str, list[float]] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for _ in range(arguments.rounds):
        # Sessions with spinning threads must be gone while ours runs.
        sessions = [onnxruntime.InferenceSession(f, providers=["CPUExecutionProvider"]) for f in files]
        for size in SIZES:
            timed(times, f"bare {size}", partial(bare, sessions, x, size))
        sessions = [onnxruntime.InferenceSession(f, options, providers=["CPUExecutionProvider"]) for f in files]
        for size in SIZES:
            timed(times, f"one thread {size}", partial(bare, sessions, x, size))
        timed(times, "ours", partial(judgement.tally_of, judge, [candidate], data))
        with mock.patch("qcore.data.dataset.batches", return_value=prepared):
            timed(times, "prepared", partial(judgement.tally_of, judge, [candidate], data))
    rounds = range(arguments.rounds)
    best = [min(times[f"bare {s}"][k] for s in SIZES) for k in rounds]
    size = min(SIZES, key=lambda s: median(times[f"bare {s}"]))
    asked = [sys.executable, "-m", "qcore", "evaluate", "--json", "--out", out]
    asked += ["--model", model, "--baseline", baseline, "--data", card]
    script = [sys.executable, "-c", BARE, model, baseline, card, size]
    commands = {
        "standard": asked,
        "brief": [*asked, "--costs", "brief"],
        "bare command": script,
    }
    return {
        "model": name,
        "samples": data.n,
        "preparing s": preparing,
        **{f"{k} s": median(v) for k, v in times.items()},
        "cpu, prepared": median(
            min(times[f"one thread {s} cpu"][k] for s in SIZES) / times["prepared cpu"][k] for k in rounds
        ),
        "throughput, prepared": median(best[k] / times["prepared"][k] for k in rounds),
        "throughput, preparing counted": median((best[k] + preparing) / times["ours"][k] for k in rounds),
        **{
            f"{k} s": seconds(partial(finished, command))
            for k, command in commands.items()
            if not arguments.no_commands
        },
    }


def memory(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return the peak memory on the evaluation images of CIFAR-10, and on a tenth of them."""
    baseline, card = arguments.bench / f"models/{name}.onnx", arguments.bench / f"{CARDS[name]}.yaml"
    model, peaks, samples = folder / f"{name}.q.onnx", {}, {"1x": 1000, "10x": 10_000}
    steps.compress(model=baseline, data=arguments.card or card, out=model, target="host")
    for times, n in samples.items():
        fields = yaml.safe_load(card.read_text())
        fields["splits"] = {"evaluation": {"path": str(arguments.bench / "cifar10_test.npz"), "range": [0, n]}}
        (folder / f"{times}.yaml").write_text(yaml.safe_dump(fields))
        command = [sys.executable, "-c", MEMORY, model, baseline, folder / f"{times}.yaml", folder / "r.json"]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        peaks[times] = int(done.stdout) / 1024
    return {"model": name, **{f"MiB of {samples[k]}": v for k, v in peaks.items()}, "ratio": peaks["10x"] / peaks["1x"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, default=Path(__file__).resolve().parents[2] / "shared/bench")
    parser.add_argument("--card", type=Path, help="of CIFAR-10, where the one in the folder does not calibrate well")
    parser.add_argument("--models", default=",".join(CARDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-commands", action="store_true", help="leave out whole commands")
    parser.add_argument("--memory", action="store_true", help="peak memory instead, of ResNet8")
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores, onnxruntime {onnxruntime.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            print(json.dumps(memory("resnet8_cifar10", arguments, Path(folder))))
            return
        for name in arguments.models.split(","):
            print(json.dumps(row(name, arguments, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
