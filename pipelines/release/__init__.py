"""The pipeline `release`; its code is `pipeline.py`, its compiled form `pipeline.yaml`."""

from qcore.pipelines.release.pipeline import release

__all__ = ["release"]
