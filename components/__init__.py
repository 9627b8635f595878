"""Kubeflow Pipelines components: thin, typed, one call each.

`from qcore.components import calibrate, quantize` gives the components themselves, to compose in a pipeline.
"""

from qcore.components.calibrate import calibrate
from qcore.components.cluster import cluster
from qcore.components.compress import compress
from qcore.components.cosign import cosign
from qcore.components.decompose import decompose
from qcore.components.evaluate import evaluate
from qcore.components.evaluate_shard import evaluate_shard
from qcore.components.finetune import finetune
from qcore.components.gate import gate
from qcore.components.merge_reports import merge_reports
from qcore.components.merge_tables import merge_tables
from qcore.components.package import package
from qcore.components.parity import parity
from qcore.components.prune import prune
from qcore.components.prune_channels import prune_channels
from qcore.components.publish import publish
from qcore.components.quantize import quantize
from qcore.components.refresh_repository import refresh_repository
from qcore.components.review import review

__all__ = [
    "calibrate",
    "cluster",
    "compress",
    "cosign",
    "decompose",
    "evaluate",
    "evaluate_shard",
    "finetune",
    "gate",
    "merge_reports",
    "merge_tables",
    "package",
    "parity",
    "prune",
    "prune_channels",
    "publish",
    "quantize",
    "refresh_repository",
    "review",
]
