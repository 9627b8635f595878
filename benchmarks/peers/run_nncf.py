"""nncf.quantize on ONNX (3.x): presets, fast or sequential bias correction.

It chooses the sign of each activation itself (a symmetric tensor without negatives becomes uint8) and refuses to have
it forced, so `activations` is not obeyed: with `symmetric` it has one bit more than a strict int8 target allows.
"""

import nncf
import numpy as np
import onnx
from nncf.common.quantization.structs import QuantizationScheme
from nncf.onnx.quantization.quantize_model import quantize_impl
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix, QuantizationParameters
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    RangeEstimatorParametersSet,
    StatisticsCollectorParameters,
    StatisticsType,
)
from protocol import Job, NotOffered, input_name, serve


def ranges(rule: str) -> RangeEstimatorParameters:
    """Return how activation ranges are estimated; its own default is the mean of the per-sample extremes."""
    if rule == "default":
        return RangeEstimatorParameters()
    if rule == "min-max":
        return RangeEstimatorParametersSet.MINMAX
    if rule == "percentile":
        low = StatisticsCollectorParameters(StatisticsType.QUANTILE, AggregatorType.MEAN, quantile_outlier_prob=1e-4)
        high = StatisticsCollectorParameters(StatisticsType.QUANTILE, AggregatorType.MEAN, quantile_outlier_prob=1e-4)
        return RangeEstimatorParameters(low, high)
    raise NotOffered(f"ranges {rule} is not offered on ONNX, only default, min-max, percentile")


def quantize(job: Job) -> None:
    """Write the quantized model."""
    recovery = job.recovery("fast-bias-correction", "bias-correction")
    symmetric = QuantizationScheme.SYMMETRIC
    mode = symmetric if job.options["symmetric"] else QuantizationScheme.ASYMMETRIC
    job.only("weight_bits", 8)
    feeds = list(job.feeds(input_name(job.model)))
    advanced = AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.DISABLE,
        disable_bias_correction=not recovery,
        activations_quantization_params=QuantizationParameters(mode=mode),
        weights_quantization_params=QuantizationParameters(
            num_bits=8,
            mode=symmetric,
            per_channel=job.options["weights"] == "per-channel",
        ),
        activations_range_estimator_params=ranges(job.options["ranges"]),
    )
    model = quantize_impl(
        onnx.load(job.model),
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset.PERFORMANCE if job.options["symmetric"] else nncf.QuantizationPreset.MIXED,
        subset_size=len(feeds),
        fast_bias_correction="bias-correction" not in recovery,
        advanced_parameters=advanced,
    )
    onnx.save(model, job.output)


if __name__ == "__main__":
    np.random.seed(0)  # noqa: NPY002 - its algorithms draw from the global generator
    serve(quantize, f"nncf {nncf.__version__}")
