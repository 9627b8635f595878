"""The component `evaluate`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.evaluate.component import evaluate

__all__ = ["evaluate"]
