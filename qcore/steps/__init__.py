"""The steps of the main path on files: read, one call, write all at once.

The command line, the pipeline components and the tests call exactly these functions. Each loads only what it needs,
so importing this package is cheap. Inputs are never changed, and nothing is written beside them.
"""

from qcore.steps.auto import AutoSummary as AutoSummary
from qcore.steps.auto import compress_auto as compress_auto
from qcore.steps.calibration import CALIBRATION_BINS as CALIBRATION_BINS
from qcore.steps.calibration import CALIBRATION_DECAY as CALIBRATION_DECAY
from qcore.steps.calibration import calibrate as calibrate
from qcore.steps.calibration import merge_tables as merge_tables
from qcore.steps.compression import CompressionSummary as CompressionSummary
from qcore.steps.compression import compress as compress
from qcore.steps.compression import quantize as quantize
from qcore.steps.costs import TIMING_SECONDS as TIMING_SECONDS
from qcore.steps.costs import Costing as Costing
from qcore.steps.costs import costing_of as costing_of
from qcore.steps.decision import gate as gate
from qcore.steps.decision import load_report as load_report
from qcore.steps.finetuning import Finetuning as Finetuning
from qcore.steps.finetuning import finetune as finetune
from qcore.steps.guard import OnEpoch as OnEpoch
from qcore.steps.guard import OnTrial as OnTrial
from qcore.steps.guard import Progress as Progress
from qcore.steps.guard import is_first as is_first
from qcore.steps.judgement import evaluate as evaluate
from qcore.steps.judgement import evaluate_shard as evaluate_shard
from qcore.steps.judgement import merge_reports as merge_reports
from qcore.steps.layers import layer_paths as layer_paths
from qcore.steps.layers import layers as layers
from qcore.steps.lint import LintReport as LintReport
from qcore.steps.lint import lint as lint
from qcore.steps.matching import MeasuredFiles as MeasuredFiles
from qcore.steps.parity import parity as parity
from qcore.steps.precision import MixedSummary as MixedSummary
from qcore.steps.precision import mixed_precision as mixed_precision
from qcore.steps.precision import pareto_paths as pareto_paths
from qcore.steps.reduction import cluster as cluster
from qcore.steps.reduction import decompose as decompose
from qcore.steps.reduction import prune as prune
from qcore.steps.reduction import prune_channels as prune_channels
from qcore.steps.release import package as package
from qcore.steps.release import provenance as provenance
from qcore.steps.release import publish as publish
from qcore.steps.repository import cosign as cosign
from qcore.steps.repository import refresh as refresh
from qcore.steps.review import Beside as Beside
from qcore.steps.review import ReviewFiles as ReviewFiles
from qcore.steps.review import class_names as class_names
from qcore.steps.review import review as review
from qcore.steps.review import review_paths as review_paths
from qcore.steps.search import sensitivity as sensitivity
from qcore.steps.tries import journal_path as journal_path
from qcore.steps.tries import models_path as models_path
from qcore.steps.verification import Verification as Verification
from qcore.steps.verification import verify_gate as verify_gate
from qcore.steps.waiving import make_owner_key as make_owner_key
from qcore.steps.waiving import waive as waive
