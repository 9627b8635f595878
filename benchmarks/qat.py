"""What an epoch of quantization-aware training costs beside the same loop written by hand in torch.

`python benchmarks/qat.py [--bench FOLDER] [--epochs N] [--batch N] [--out results.json]`. ResNet8 on the 20,000 CIFAR
images of the bench folder, less those that judge. Both loops move and mirror images, ask the float model, round the
weights per channel and as many activations with learned scales, follow the sum of cross entropy and divergence with
AdamW, and judge after every epoch. They take epochs in turn, each in a process of its own with all cores; the figure is
the ratio of the medians. Ten epochs of the loops differ from one by nothing but length.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from executor import ResNet8, take_weights
from torch import nn
from torch.nn import functional

from qcore import steps
from qcore.graph.io import load_model
from qcore.training.executor import build_executor

CARD = """\
name: cifar10
path: {data}
layout: NHWC
model_layout: NCHW
splits:
  calibration: {{count: 256}}
  validation: {{count: 1000}}
  train: {{rest: true}}
"""
RECIPE = """\
name: qat
steps:
  - {{method: quantize, ranges: percentile, percentile: 99.999}}
  - {{method: qat, epochs: {epochs}, batch: {batch}, augment: {{pad_crop: 4, flip: true}}, teacher_weight: 0.5}}
"""
JUDGES = 1000
CALIBRATION = 256


class Rounded(nn.Module):
    """Rounds an activation to eight bits with a learned scale (LSQ)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.05))
        self.register_buffer("zero", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = (x.numel() * 127) ** -0.5
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero, -128, 127, factor)


class RoundedResNet8(ResNet8):
    """ResNet8 whose layers see rounded weights and rounded inputs, and whose sums are of rounded terms."""

    PLACES = 15

    def __init__(self) -> None:
        super().__init__(in_place=False)
        self.rounded = nn.ModuleList([Rounded() for _ in range(self.PLACES)])
        self.scales: dict[nn.Module, torch.Tensor] = {}

    def set_scales(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                self.scales[layer] = layer.weight.detach().flatten(1).abs().amax(1) / 127

    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale = self.scales[layer]
        zero = torch.zeros(len(scale), dtype=torch.int32)
        w = torch.fake_quantize_per_channel_affine(layer.weight, scale, zero, 0, -128, 127)
        if isinstance(layer, nn.Linear):
            return functional.linear(x, w, layer.bias)
        return functional.conv2d(x, w, layer.bias, layer.stride, layer.padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = iter(self.rounded)
        x = next(q)(x)
        x = next(q)(self.act(self.layer(self.stem, x)))
        y = next(q)(self.act(self.layer(self.a[0], x)))
        x = next(q)(self.act(x + next(q)(self.layer(self.a[1], y))))
        for block in (self.b, self.c):
            pads, first = block[1]
            y = next(q)(self.act(self.layer(first, pads(x))))
            y = next(q)(self.layer(block[2], y))
            x = next(q)(self.act(next(q)(self.layer(block[0], x)) + y))
        return next(q)(self.layer(self.fc, next(q)(x.mean((2, 3)))))


def moved(x: torch.Tensor, rng: np.random.Generator, pad: int = 4) -> torch.Tensor:
    """Return images moved by up to `pad` pixels and mirrored by chance."""
    padded, out = functional.pad(x, (pad,) * 4), torch.empty_like(x)
    shifts, flips = rng.integers(0, 2 * pad + 1, (len(x), 2)), rng.integers(0, 2, len(x))
    for k, ((a, b), flip) in enumerate(zip(shifts, flips, strict=True)):
        window = padded[k, :, a : a + x.shape[2], b : b + x.shape[3]]
        out[k] = window.flip(2) if flip else window
    return out


def by_hand(model: Path, data: Path, epochs: int, batch: int) -> list[float]:
    """Return the seconds of each epoch of the loop written by hand."""
    torch.set_flush_denormal(True)
    stored = np.load(data)
    images, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
    order = np.random.default_rng(0).permutation(len(labels))
    judging, learning = order[CALIBRATION : CALIBRATION + JUDGES], order[CALIBRATION + JUDGES :]
    teacher, student = ResNet8(in_place=True), RoundedResNet8()
    take_weights(teacher, build_executor(load_model(model)))
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.set_scales()
    for net in (teacher, student):
        net.to(memory_format=torch.channels_last)
    scales = [p for n, p in student.named_parameters() if "rounded" in n]
    weights = [p for n, p in student.named_parameters() if "rounded" not in n]
    rates = [1e-3 * float(p.detach().square().mean().sqrt()) for p in weights]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(weights, rates, strict=True)]
    optimizer = torch.optim.AdamW([*groups, {"params": scales, "lr": 1e-4, "weight_decay": 0.0}], weight_decay=1e-4)
    steps_in_all = epochs * -(-len(learning) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_in_all)
    rng, seconds = np.random.default_rng(0), []

    def batch_of(places: np.ndarray) -> torch.Tensor:
        x = images[places].permute(0, 3, 1, 2).float()
        return x.contiguous(memory_format=torch.channels_last)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            soft = functional.log_softmax(teacher(x), 1)
        logits = student(x)
        divergence = functional.kl_div(functional.log_softmax(logits, 1), soft, reduction="batchmean", log_target=True)
        return 0.5 * divergence + 0.5 * functional.cross_entropy(logits, y)

    for _ in range(epochs):
        start, shuffled = time.perf_counter(), rng.permutation(learning)
        for k in range(0, len(shuffled), batch):
            places = shuffled[k : k + batch]
            x = moved(batch_of(places), rng).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss = loss_of(x, labels[places])
            loss.backward()
            nn.utils.clip_grad_norm_([*weights, *scales], 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            for k in range(0, JUDGES, batch):
                loss_of(batch_of(judging[k : k + batch]), labels[judging[k : k + batch]])
        seconds.append(time.perf_counter() - start)
    return seconds


def by_qcore(model: Path, data: Path, epochs: int, batch: int) -> list[float]:
    """Return the seconds of each epoch of a recipe with `qat`."""
    with tempfile.TemporaryDirectory() as folder:
        card, recipe = Path(folder) / "card.yaml", Path(folder) / "recipe.yaml"
        card.write_text(CARD.format(data=data))
        recipe.write_text(RECIPE.format(epochs=epochs, batch=batch))
        taken: list[float] = []
        steps.compress(
            model=model,
            data=card,
            out=Path(folder) / "out.onnx",
            recipe=str(recipe),
            target="arm-dotprod",
            device="cpu",
            on_epoch=lambda e: taken.append(e.seconds),
        )
    return taken[1:]  # the first is the state before training


LOOPS = {"hand": by_hand, "qcore": by_qcore}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path(__file__).parents[2] / "shared" / "bench")
    parser.add_argument("--epochs", type=int, default=2, help="in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", choices=LOOPS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, data = (args.bench / p for p in ("models/resnet8_cifar10.onnx", "cifar10_train20k.npz"))
    if args.only:
        print(json.dumps(LOOPS[args.only](model.resolve(), data.resolve(), args.epochs, args.batch)))
        return
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(args.turns):
        for name in LOOPS:
            call = [sys.executable, __file__, "--bench", str(args.bench), "--only", name]
            call += ["--epochs", str(args.epochs), "--batch", str(args.batch)]
            done = subprocess.run(call, check=True, capture_output=True, text=True)
            seconds[name] += json.loads(done.stdout.splitlines()[-1])
            print(name, [round(s, 1) for s in seconds[name][-args.epochs :]], flush=True)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    result = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "seconds": seconds,
        "medians": medians,
        "ratio": medians["qcore"] / medians["hand"],
    }
    print(f"an epoch: by hand {medians['hand']:.1f} s, qcore {medians['qcore']:.1f} s, ratio {result['ratio']:.2f}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
