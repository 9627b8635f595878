"""The component `calibrate`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.calibrate.component import calibrate

__all__ = ["calibrate"]
