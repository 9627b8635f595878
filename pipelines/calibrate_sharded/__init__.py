"""The pipeline `calibrate_sharded`; its code is `pipeline.py`, its compiled form `pipeline.yaml`."""

from qcore.pipelines.calibrate_sharded.pipeline import calibrate_sharded

__all__ = ["calibrate_sharded"]
