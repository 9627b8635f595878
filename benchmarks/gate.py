"""What a decision on a million samples costs: `PYTHONPATH=.:tests python benchmarks/gate.py [--n N] [--rounds R]`.

CPU time of `decide` alone (the report is in memory), with and without a champion, and of checking the fields of
the parsed JSON.
"""

import argparse
import json
import time

import numpy as np
from judging import classified, valued, with_champion

from qcore.gate import decide
from qcore.policy import ErrorLimit, GatePolicy, GroupLimit, MetricLimit
from qcore.report import EvaluationReport
from qcore.report_file import report_from_json


def classes(n: int, rng: np.random.Generator) -> tuple[EvaluationReport, tuple[int, ...]]:
    """100 classes, 80 % right, 1 % changed; one slice of half of the samples; the champion differs in another 1 %."""
    y = rng.integers(0, 100, n)
    base = np.where(rng.random(n) < 0.8, y, 0)
    ours, theirs = (np.where(rng.random(n) < 0.99, base, 1) for _ in range(2))
    plain = classified(*(tuple(c.tolist()) for c in (y, base, ours)), {"even": tuple(range(0, n, 2))})
    return plain, tuple(theirs.tolist())


def numbers(n: int, rng: np.random.Generator, task: str) -> tuple[EvaluationReport, dict[str, np.ndarray]]:
    """Errors or scores that differ a little in every sample; of anomalies three in ten are odd."""
    base = rng.exponential(size=n)
    ours, theirs = (np.maximum(base + 0.01 * rng.normal(size=n), 0) for _ in range(2))
    if task == "regression":
        return valued(task, absolute_error=(base, ours)), {"absolute_error": theirs}
    odd = (rng.random(n) < 0.3).astype(int)
    return valued(task, tuple(odd.tolist()), score=(base + odd, ours + odd)), {"score": theirs + odd}


def policy(task: str, champion: bool) -> GatePolicy:
    """Return limits of everything that the task measures, against the champion too if there is one."""
    drop = 0.05 if champion else None
    if task == "regression":
        return GatePolicy(mae=ErrorLimit(max_increase=0.05, max_increase_champion=drop))
    if task == "anomaly":
        return GatePolicy(auc=MetricLimit(max_drop=0.05, max_drop_champion=drop))
    groups = GroupLimit(max_drop=0.05, max_drop_champion=drop)
    return GatePolicy(top1=MetricLimit(max_drop=0.05, max_drop_champion=drop), slices=groups, classes=groups)


def seconds(call, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return sorted(found)[rounds // 2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    for task in ("classification", "regression", "anomaly"):
        rng = np.random.default_rng(0)
        plain, column = classes(asked.n, rng) if task == "classification" else numbers(asked.n, rng, task)
        for report in (plain, with_champion(plain, column)):
            chosen = policy(task, report.champion is not None)
            assert decide(report, chosen).outcome == "pass"
            took = seconds(lambda report=report, chosen=chosen: decide(report, chosen), asked.rounds)
            value = json.loads(json.dumps(report.to_json()))
            read = seconds(lambda value=value: report_from_json(value), 3)
            rivals = "baseline" if report.champion is None else "baseline and champion"
            print(f"{task}, {rivals}: decide {took:.2f} s, check fields {read:.2f} s of CPU time, {asked.n} samples")
