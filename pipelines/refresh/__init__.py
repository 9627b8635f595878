"""The pipeline `refresh`; its code is `pipeline.py`, its compiled form `pipeline.yaml`."""

from qcore.pipelines.refresh.pipeline import refresh

__all__ = ["refresh"]
