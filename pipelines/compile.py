"""The compiled forms beside the sources: `python -m qcore.pipelines.compile OUT_DIR` (`make compile`: OUT_DIR = repo).

The same sources give the same bytes: nothing of the machine or the time is in them, and the image is the default one
unless `QCORE_IMAGE` is set.
"""

import sys
from pathlib import Path
from typing import Any

from kfp import compiler

from qcore.components.calibrate import calibrate
from qcore.components.cluster import cluster
from qcore.components.compress import compress
from qcore.components.cosign import cosign
from qcore.components.decompose import decompose
from qcore.components.evaluate import evaluate
from qcore.components.evaluate_shard import evaluate_shard
from qcore.components.finetune import finetune
from qcore.components.gate import gate
from qcore.components.merge_reports import merge_reports
from qcore.components.merge_tables import merge_tables
from qcore.components.package import package
from qcore.components.parity import parity
from qcore.components.prune import prune
from qcore.components.prune_channels import prune_channels
from qcore.components.publish import publish
from qcore.components.quantize import quantize
from qcore.components.refresh_repository import refresh_repository
from qcore.components.review import review
from qcore.files import write_atomic
from qcore.pipelines.calibrate_sharded import calibrate_sharded
from qcore.pipelines.evaluate_sharded import evaluate_sharded
from qcore.pipelines.refresh import refresh
from qcore.pipelines.release import release

SOURCES: dict[str, Any] = {
    **{
        f"components/{c.name.replace('-', '_')}/component.yaml": c
        for c in (
            calibrate,
            merge_tables,
            compress,
            quantize,
            prune,
            prune_channels,
            cluster,
            decompose,
            finetune,
            evaluate,
            evaluate_shard,
            merge_reports,
            parity,
            gate,
            review,
            package,
            cosign,
            publish,
            refresh_repository,
        )
    },
    "pipelines/calibrate_sharded/pipeline.yaml": calibrate_sharded,
    "pipelines/evaluate_sharded/pipeline.yaml": evaluate_sharded,
    "pipelines/refresh/pipeline.yaml": refresh,
    "pipelines/release/pipeline.yaml": release,
}


def compile_all(out: Path) -> tuple[Path, ...]:
    """Return the files written below the folder `out`: one per component and one per pipeline."""
    written = []
    for name, source in SOURCES.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp.yaml")  # kfp wants a suffix that it knows
        compiler.Compiler().compile(source, str(draft))
        write_atomic(path, draft.read_bytes())
        draft.unlink()
        written.append(path)
    return tuple(written)


if __name__ == "__main__":
    for file in compile_all(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        sys.stdout.write(f"{file}\n")
