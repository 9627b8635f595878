"""Component `merge_tables`: the calibration tables of shards, back together."""

from typing import List

from kfp import dsl

from qcore.components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def merge_tables(
    tables: dsl.Input[List[dsl.Artifact]],
    table: dsl.Output[dsl.Artifact],
) -> None:
    """Merge the calibration tables of shards; the result is that of one process, byte for byte.

    Args:
        tables: Calibration tables of the shards of one split, in any order.
        table: Calibration table of all their samples.
    """
    from pathlib import Path

    from qcore import steps
    from qcore.tracking.facts import file_facts
    from qcore.tracking.tracker import Tracker

    with Tracker("merge_tables") as t:
        result = steps.merge_tables(tables=[Path(part.path) for part in tables], out=Path(table.path))
        table.metadata.update(file_facts(Path(table.path), "qcore-calibration"))
        t.params({"shards": len(tables)})
        t.params({"calibration_samples": result.samples}, on="parent")
        t.tags({"model.sha256": result.model_sha256, "data.sha256": result.data_sha256})
