"""The component `merge_reports`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.merge_reports.component import merge_reports

__all__ = ["merge_reports"]
