"""The component `prune_channels`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.prune_channels.component import prune_channels

__all__ = ["prune_channels"]
