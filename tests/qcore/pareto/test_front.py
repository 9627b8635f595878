"""The front: nothing on it is beaten, and everything off it is."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from qcore.pareto.front import dominates, pareto_front


@dataclass(frozen=True)
class Costs:
    error: float
    size_bytes: int
    latency_ms: float | None = None


few = st.integers(0, 4)
costs = st.builds(Costs, error=few.map(float), size_bytes=few, latency_ms=few.map(float))


@given(st.lists(costs, max_size=12))
def test_the_front_is_what_nothing_beats(results):
    front = pareto_front(results)
    assert len(set(front)) == len(front)
    for k, a in enumerate(results):
        beaten = any(
            b.error <= a.error and b.size_bytes <= a.size_bytes and b.latency_ms <= a.latency_ms and b != a
            for b in results
        )
        assert (k in front) != beaten
    sizes = [results[k].size_bytes for k in front]
    assert sizes == sorted(sizes)


def test_a_latency_that_was_not_measured_does_not_count():
    assert dominates(Costs(1, 1), Costs(2, 2, 0.1))
    assert not dominates(Costs(1, 1, 0.2), Costs(2, 2, 0.1))
    assert pareto_front([Costs(1.0, 5), Costs(1.0, 5)]) == (0, 1)  # equals beat nobody
