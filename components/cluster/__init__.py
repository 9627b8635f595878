"""The component `cluster`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.cluster.component import cluster

__all__ = ["cluster"]
