"""The component `evaluate_shard`; its code is `component.py`, its compiled form `component.yaml`."""

from qcore.components.evaluate_shard.component import evaluate_shard

__all__ = ["evaluate_shard"]
