"""The component `decompose`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.decompose.component import decompose

__all__ = ["decompose"]
