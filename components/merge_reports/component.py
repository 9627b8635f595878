"""Component `merge_reports`: the shards of an evaluation, back together."""

from typing import List

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def merge_reports(
    parts: dsl.Input[List[dsl.Artifact]],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Merge the shards of an evaluation; the report is that of one process, but for costs.

    Args:
        parts: What `evaluate_shard` measured on every shard of one split, in any order.
        report: Evaluation report (JSON): per-sample results, metrics, costs, digests.
        metrics: The metrics and costs as numbers.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.derived import cost_metrics
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("merge_reports") as t:
        out = Path(report.path)
        result = steps.merge_reports(parts=[Path(part.path) for part in parts], out=out)
        report.metadata.update(file_facts(out, "qcore-evaluation"))
        t.params({"shards": len(parts)})
        t.metrics({**result.metrics, **cost_metrics(result), "n": result.n}, kfp=metrics)
        t.params({"data": result.data.name, "evaluation_split": result.data.split}, on="parent")
        t.artifact(out, name="report.json")
