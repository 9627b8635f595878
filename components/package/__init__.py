"""The component `package`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.package.component import package

__all__ = ["package"]
