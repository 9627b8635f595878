"""The component `compress`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.compress.component import compress

__all__ = ["compress"]
