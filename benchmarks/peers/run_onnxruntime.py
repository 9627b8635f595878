"""onnxruntime.quantization: quant_pre_process, then quantize_static."""

import tempfile
from pathlib import Path

import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from protocol import Job, input_name, serve

RANGES = {
    "default": (CalibrationMethod.MinMax, {}),
    "min-max": (CalibrationMethod.MinMax, {}),
    "percentile": (CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
    # Its default of 128 bins gives min-max byte for byte; more bins are not an option of quantize_static.
    "entropy": (CalibrationMethod.Entropy, {}),
}


class Reader(CalibrationDataReader):
    """Samples one by one."""

    def __init__(self, job: Job):
        self.feeds = job.feeds(input_name(job.model))

    def get_next(self):
        """Return the next feed, or None."""
        return next(self.feeds, None)


def quantize(job: Job) -> None:
    """Write the quantized model."""
    job.recovery("smooth-quant")
    bits = job.only("weight_bits", 8, 4)
    method, extra = RANGES[job.only("ranges", *RANGES)]
    symmetric = {"ActivationSymmetric": job.options["symmetric"], "WeightSymmetric": True}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(job.model, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            job.output,
            Reader(job),
            quant_format=QuantFormat.QDQ,
            per_channel=job.options["weights"] == "per-channel",
            activation_type=QuantType.QUInt8 if job.options["activations"] == "uint8" else QuantType.QInt8,
            weight_type=QuantType.QInt8 if bits == 8 else QuantType.QInt4,
            calibrate_method=method,
            extra_options={**symmetric, **extra},
        )


if __name__ == "__main__":
    serve(quantize, f"onnxruntime {onnxruntime.__version__}")
