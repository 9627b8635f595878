"""The component `review`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.review.component import review

__all__ = ["review"]
