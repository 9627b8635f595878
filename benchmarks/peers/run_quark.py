"""AMD Quark for ONNX: its own static quantizer with CLE, bias correction, AdaRound, AdaQuant and GPTQ."""

import importlib.metadata

from onnxruntime.quantization import CalibrationDataReader
from protocol import Job, input_name, serve
from quark.onnx import (
    AdaQuantConfig,
    AdaRoundConfig,
    BiasCorrectionConfig,
    CalibMethod,
    CLEConfig,
    GPTQConfig,
    Int8Spec,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    QuantGranularity,
    UInt8Spec,
)

RANGES = {
    "default": CalibMethod.Percentile,
    "min-max": CalibMethod.MinMax,
    "percentile": CalibMethod.Percentile,
    "entropy": CalibMethod.Entropy,
    "layerwise-percentile": CalibMethod.LayerwisePercentile,
}


class Reader(CalibrationDataReader):
    """Samples one by one."""

    def __init__(self, job: Job):
        self.feeds = job.feeds(input_name(job.model))

    def get_next(self):
        """Return the next feed, or None."""
        return next(self.feeds, None)


def algorithm(name: str):
    """Return one of its recovery algorithms as it ships, but with batches of 8 samples where it trains."""
    match name:
        case "cle":
            return CLEConfig()
        case "bias-correction":
            return BiasCorrectionConfig()
        case "gptq":
            return GPTQConfig()
        case "adaround":
            return AdaRoundConfig(batch_size=8, num_iterations=1000, learning_rate=0.1, early_stop=True)
        case "adaquant":
            return AdaQuantConfig(batch_size=8, num_iterations=1000, learning_rate=1e-5, early_stop=True)
        case _:
            return AdaRoundConfig(
                batch_size=8, num_iterations=1000, learning_rate=0.1, early_stop=True, update_bias=True
            )


def quantize(job: Job) -> None:
    """Write the quantized model."""
    job.only("weight_bits", 8)
    names = job.recovery("cle", "bias-correction", "gptq", "adaround", "adaround-bias", "adaquant")
    spec = Int8Spec if job.options["activations"] == "int8" else UInt8Spec
    per_channel = job.options["weights"] == "per-channel"
    config = QConfig(
        global_config=QLayerConfig(
            input_tensors=spec(
                symmetric=job.options["symmetric"], calibration_method=RANGES[job.only("ranges", *RANGES)]
            ),
            weight=Int8Spec(
                calibration_method=CalibMethod.MinMax,
                quant_granularity=QuantGranularity.Channel if per_channel else QuantGranularity.Tensor,
            ),
        ),
        algo_config=[algorithm(n) for n in names],
        # Its equalization only sees through Relu; as it ships for mobile nets, ReLU6 becomes Relu first.
        extra_options={"ForceQuantizeNoInputCheck": True, "ReplaceClip6Relu": any(n.startswith("cle") for n in names)},
    )
    ModelQuantizer(config).quantize_model(str(job.model), str(job.output), Reader(job))


if __name__ == "__main__":
    serve(quantize, f"amd-quark {importlib.metadata.version('amd-quark')}")
