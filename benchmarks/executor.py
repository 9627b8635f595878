"""What the executor costs beside the same net written by hand in torch: training steps and forward passes.

`python benchmarks/executor.py [--bench FOLDER] [--model NAME] [--batch N] [--steps N] [--out results.json]`. Both hold
the same weights, get the same batch, and take steps in turn (forward, cross entropy, backward, SGD); the figures are
medians and their ratio, for both memory layouts of each. The hand-written nets are what one would write: modules in
`Sequential`s, activations in place where the rest of the net allows it (`--in-place`).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from qcore.graph.io import load_model
from qcore.training.executor import Executor, ExecutorOptions, build_executor


class ResNet8(nn.Module):
    """The ResNet8 of MLPerf Tiny without batch norms: (n, 3, 32, 32) -> (n, 10)."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.act = nn.ReLU(in_place)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)])
        self.b = self.narrowing(16, 32)
        self.c = self.narrowing(32, 64)
        self.fc = nn.Linear(64, 10)

    @staticmethod
    def narrowing(cin: int, cout: int) -> nn.ModuleList:
        pads = nn.ZeroPad2d((0, 1, 0, 1))
        first = nn.Sequential(pads, nn.Conv2d(cin, cout, 3, stride=2))
        return nn.ModuleList([nn.Conv2d(cin, cout, 1, stride=2), first, nn.Conv2d(cout, cout, 3, padding=1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        x = self.act(x + self.a[1](self.act(self.a[0](x))))
        for block in (self.b, self.c):
            x = self.act(block[0](x) + block[2](self.act(block[1](x))))
        return self.fc(x.mean((2, 3)))


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 without batch norms, padded as TensorFlow does: (n, 3, 224, 224) -> (n, 1000)."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.stem = self.conv(3, 32, 3, 2)
        blocks, cin = [], 32
        for expand, cout, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for i in range(count):
                width, step = cin * expand, stride if i == 0 else 1
                widen = [self.conv(cin, width, 1)] if expand > 1 else []
                blocks.append(nn.Sequential(*widen, self.conv(width, width, 3, step, width), nn.Conv2d(width, cout, 1)))
                cin = cout
        self.blocks = nn.ModuleList(blocks)
        self.top = self.conv(320, 1280, 1)
        self.head = nn.Conv2d(1280, 1000, 1)

    def conv(self, cin: int, cout: int, k: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        pads = [nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []
        layer = nn.Conv2d(cin, cout, k, stride, 0 if stride == 2 else k // 2, groups=groups)
        return nn.Sequential(*pads, layer, nn.ReLU6(self.in_place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if y.shape == x.shape else y
        return self.head(self.top(x).mean((2, 3), keepdim=True)).flatten(1)


NETS: dict[str, tuple[Callable[[bool], nn.Module], int, int]] = {
    "resnet8_cifar10": (ResNet8, 32, 64),
    "mobilenetv2_100_224": (MobileNetV2, 224, 16),
}
"""Model in the bench folder -> the same net by hand, the side of its images, and the batch size."""


def take_weights(net: nn.Module, executor: Executor) -> None:
    """Give `net` the weights of `executor`: both list layers in the order of the graph."""
    with torch.no_grad():
        theirs = [w for w in executor.weights.values() if w.requires_grad]
        ours = list(net.parameters())
        assert [w.shape for w in theirs] == [w.shape for w in ours]
        for own, other in zip(ours, theirs, strict=True):
            own.copy_(other)


def stepper(run: Callable[[], torch.Tensor], module: nn.Module, target: torch.Tensor) -> Callable[[], None]:
    """Return one training step."""
    optimizer = torch.optim.SGD([w for w in module.parameters() if w.requires_grad], lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(), target).backward()
        optimizer.step()

    return step


def without_gradients(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            run()

    return forward


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each call; the calls take turns, in a new order each round."""
    rng, taken = np.random.default_rng(0), {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name in rng.permutation(list(calls)):
            start = time.perf_counter()
            calls[name]()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def compare(path: Path, batch: int, steps: int, in_place: bool) -> dict[str, object]:
    """Return the medians of one model and what the executor costs beside the best hand-written one."""
    make, side, default = NETS[path.stem]
    model = load_model(path)
    name = str(model.graph.inputs[0].name)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((batch or default, 3, side, side), np.float32))
    target = torch.arange(len(x)) % 10
    expected = ort.InferenceSession(path).run(None, {name: x.numpy()})[0]
    train: dict[str, Callable[[], None]] = {}
    evaluate: dict[str, Callable[[], None]] = {}
    for layout, last in (("channels first", False), ("channels last", True)):
        executor = build_executor(model, ExecutorOptions(channels_last=last))
        net = make(in_place)
        own_x = x.contiguous(memory_format=torch.channels_last) if last else x
        net = net.to(memory_format=torch.channels_last) if last else net
        take_weights(net, executor)
        runs = {
            f"hand-written, {layout}": (lambda n=net, v=own_x: n(v), net),
            f"executor, {layout}": (lambda e=executor: e({name: x})["logits"], executor),
        }
        for who, (run, module) in runs.items():
            assert np.abs(run().detach().numpy() - expected).max() < 1e-3, who
            train[who] = stepper(run, module, target)
            evaluate[who] = without_gradients(run)
    trained = medians(train, steps)  # first: before, malloc hands large blocks back and forward passes pay page faults
    evaluated = medians(evaluate, steps)
    row: dict[str, object] = {"batch": len(x), "forward_ms": evaluated, "step_ms": trained}
    for layout in ("channels first", "channels last"):
        for what, times in (("forward", evaluated), ("step", trained)):
            row[f"{what} ratio, {layout}"] = times[f"executor, {layout}"] / times[f"hand-written, {layout}"]
    return row


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--bench", type=Path, default=root.parent / "shared" / "bench")
    parser.add_argument("--model", choices=sorted(NETS), action="append")
    parser.add_argument("--batch", type=int, default=0, help="0: 64 for ResNet8, 16 for MobileNetV2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--in-place", action="store_true", help="hand-written nets with activations in place")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # or the momentum of vanishing gradients costs more than the net
    load = os.getloadavg()[0]
    results: dict[str, object] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{options.threads} of {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}",
    }
    for name in options.model or NETS:
        row = compare(options.bench / f"models/{name}.onnx", options.batch, options.steps, options.in_place)
        results[name] = row
        print(name, json.dumps(row, indent=1, default=str), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
