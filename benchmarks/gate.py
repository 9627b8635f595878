"""What a decision on a million samples costs: `PYTHONPATH=.:tests python benchmarks/gate.py [--n N] [--rounds R]`.

CPU time of `decide` alone (the report is in memory), with and without a champion, and of reading the report's JSON.
"""

import argparse
import json
import time

import numpy as np
from judging import classified, with_champion

from qcore.gate import decide
from qcore.policy import GatePolicy, GroupLimit, MetricLimit
from qcore.report import EvaluationReport
from qcore.report_file import report_from_json


def reports(n: int) -> dict[str, EvaluationReport]:
    """100 classes, 80 % right, 1 % changed; one slice of half of the samples; the champion differs in another 1 %."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 100, n)
    base = np.where(rng.random(n) < 0.8, y, 0)
    ours, theirs = (np.where(rng.random(n) < 0.99, base, 1) for _ in range(2))
    plain = classified(*(tuple(c.tolist()) for c in (y, base, ours)), {"even": tuple(range(0, n, 2))})
    return {"baseline": plain, "baseline and champion": with_champion(plain, tuple(theirs.tolist()))}


def policy(champion: bool) -> GatePolicy:
    drop = 0.02 if champion else None
    groups = GroupLimit(max_drop=0.05, max_drop_champion=drop and 0.05)
    return GatePolicy(top1=MetricLimit(max_drop=0.02, max_drop_champion=drop), slices=groups, classes=groups)


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
    for name, report in reports(asked.n).items():
        chosen = policy(report.champion is not None)
        assert decide(report, chosen).outcome == "pass"
        took = seconds(lambda report=report, chosen=chosen: decide(report, chosen), asked.rounds)
        value = json.loads(json.dumps(report.to_json()))
        read = seconds(lambda value=value: report_from_json(value), 3)
        print(f"{name}: decide {took:.2f} s, read {read:.2f} s of CPU time, {asked.n} samples")
