"""Component `finetune`."""

from qcore.components.finetune.component import finetune

__all__ = ["finetune"]
