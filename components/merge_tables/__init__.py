"""The component `merge_tables`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.merge_tables.component import merge_tables

__all__ = ["merge_tables"]
