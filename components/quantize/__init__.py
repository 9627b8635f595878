"""The component `quantize`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.quantize.component import quantize

__all__ = ["quantize"]
