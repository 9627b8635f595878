"""The component `gate`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.gate.component import gate

__all__ = ["gate"]
