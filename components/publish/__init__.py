"""The component `publish`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.publish.component import publish

__all__ = ["publish"]
