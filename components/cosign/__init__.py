"""The component `cosign`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.cosign.component import cosign

__all__ = ["cosign"]
