"""The component `prune`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.prune.component import prune

__all__ = ["prune"]
