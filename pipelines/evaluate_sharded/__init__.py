"""The pipeline `evaluate_sharded`; its code is `pipeline.py`, its compiled form `pipeline.yaml`."""

from qcore.pipelines.evaluate_sharded.pipeline import evaluate_sharded

__all__ = ["evaluate_sharded"]
