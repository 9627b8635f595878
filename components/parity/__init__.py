"""The component `parity`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.parity.component import parity

__all__ = ["parity"]
