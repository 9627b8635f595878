"""The steps of the main path on files: read, one call, write all at once.

The command line, the pipeline components and the tests call exactly these functions. Each loads only what it needs,
so importing this package is cheap. Inputs are never changed, and nothing is written beside them.
"""

from qcore.steps.calibration import CALIBRATION_BINS as CALIBRATION_BINS
from qcore.steps.calibration import CALIBRATION_DECAY as CALIBRATION_DECAY
from qcore.steps.calibration import calibrate as calibrate
from qcore.steps.calibration import merge_tables as merge_tables
from qcore.steps.compression import CompressionSummary as CompressionSummary
from qcore.steps.compression import compress as compress
from qcore.steps.compression import prune as prune
from qcore.steps.compression import quantize as quantize
from qcore.steps.guard import Progress as Progress
from qcore.steps.judgement import evaluate as evaluate
from qcore.steps.judgement import gate as gate
from qcore.steps.judgement import load_report as load_report
from qcore.steps.release import package as package
from qcore.steps.release import publish as publish
