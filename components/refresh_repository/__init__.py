"""The component `refresh_repository`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.refresh_repository.component import refresh_repository

__all__ = ["refresh_repository"]
