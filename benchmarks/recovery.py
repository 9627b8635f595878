"""Recovery of int8 transformers without training, on seeded encoders. Prints one line per target and recipe.

`PYTHONPATH=.:tests python benchmarks/recovery.py [--seeds 4] [--outliers 1 20 100] [--bits 8] [--post-norm]`: the
geometric mean over seeds and both forms of export of the normalised squared error of the outputs, on samples that no
step has seen, and in how many runs each recovery step was kept.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from recovering import evidence_of, parsed, recipe_with
from transformers import EncoderShape, encoder, encoder_input, exported_encoder, with_outliers

from qcore.compression import compress
from qcore.recovery import output_distance
from qcore.target import load_target

SHAPE = EncoderShape(layers=2, width=32, heads=4, hidden=64)
SAMPLES, JUDGING = 96, 256
RANGES = {"ranges": "percentile", "percentile": 99.999}
RECIPES = {
    "quantize": [],
    "correct-bias": ["correct-bias"],
    "round-weights": ["round-weights"],
    "smooth": ["smooth"],
    "smooth, correct-bias": ["smooth", "correct-bias"],
    "smooth, round-weights": ["smooth", "round-weights"],
}


def measured(methods: Sequence[str], target: str, factor: float, asked: argparse.Namespace) -> tuple[float, list[int]]:
    shape = replace(SHAPE, post_norm=asked.post_norm)
    errors: list[float] = []
    kept = [0] * len(methods)
    recipe = recipe_with(*({"method": m} for m in methods), weight_bits=asked.bits, **RANGES)
    for seed in range(asked.seeds):
        for build in (encoder, exported_encoder):
            model = parsed(with_outliers(build(seed, shape), factor))
            evidence = evidence_of(encoder_input(shape, n=SAMPLES))
            unseen = np.split(encoder_input(shape, n=JUDGING, seed=99), 8)
            made = compress(model, recipe, load_target(target), evidence)
            judged = replace(evidence, held_out=tuple({"x": x} for x in unseen))
            errors.append(float(np.log(output_distance(made.model, model, judged))))
            judgements = [s.kept for s in made.steps if s.error_after is not None]
            kept = [k + was for k, was in zip(kept, judgements, strict=True)]
    return float(np.exp(np.mean(errors))), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--outliers", type=float, nargs="+", default=[1, 20, 100])
    parser.add_argument("--targets", nargs="+", default=["x86-vnni", "npu-int8-symmetric", "tensorrt"])
    parser.add_argument("--post-norm", action="store_true", help="norms behind the sums; only with --outliers 1")
    asked = parser.parse_args()
    for target in asked.targets:
        for factor in asked.outliers:
            for name, methods in RECIPES.items():
                error, kept = measured(methods, target, factor, asked)
                print(f"{target:20} x{factor:<5g} {name:24} {error:.4f} kept {kept} of {2 * asked.seeds}", flush=True)


if __name__ == "__main__":
    main()
