"""Dynamic and weight-only quantization against onnxruntime's own tools, on one seeded transformer. Prints JSON.

`PYTHONPATH=.:tests python benchmarks/weights.py [--layers 6] [--width 384] [--sequence 128] [--out results.json]`.
Every row is a file made from the same float model: bytes, seconds to make it, output SQNR in dB over 8 samples, and
latency as a ratio to float, one thread, all files measured in turns.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from main_path import cpu
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as ort_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from transformers import EncoderShape, encoder, encoder_input

from qcore.graph.io import serialize_model
from qcore.methods.dynamic import QuantizeDynamicStep, quantize_dynamic
from qcore.methods.half import Float16Step, to_float16
from qcore.methods.weights import QuantizeWeightsStep, quantize_weights
from qcore.numerics.error import sqnr_db
from qcore.runtime import ort
from qcore.target import load_target

Make = Callable[[onnx.ModelProto], bytes]


def ours(rewrite: Callable[[ir.Model], object]) -> Make:
    return lambda proto: serialize_model(rewrite(ir.serde.deserialize_model(proto)).model)  # type: ignore[attr-defined]


def dynamic_of_ort(kind: QuantType, *, per_channel: bool) -> Make:
    def make(proto: onnx.ModelProto) -> bytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "m.onnx").write_bytes(proto.SerializeToString())
            ort_dynamic(folder / "m.onnx", folder / "q.onnx", weight_type=kind, per_channel=per_channel)
            return (folder / "q.onnx").read_bytes()

    return make


def nbits_of_ort(bits: int, *, symmetric: bool) -> Make:
    def make(proto: onnx.ModelProto) -> bytes:
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits, accuracy_level=4)
        quantizer = MatMulNBitsQuantizer(copy, algo_config=config)
        quantizer.process()
        return bytes(quantizer.model.model.SerializeToString())

    return make


def weights(**options: object) -> Make:
    step = QuantizeWeightsStep.model_validate(options)
    return ours(lambda model: quantize_weights(model, step))


def candidates() -> dict[str, Make]:
    host = load_target("host")
    made: dict[str, Make] = {
        "qcore int8-dynamic": ours(lambda m: quantize_dynamic(m, QuantizeDynamicStep(), host)),
        "qcore int8-dynamic, 7-bit weights": ours(
            lambda m: quantize_dynamic(m, QuantizeDynamicStep(weight_bits=7), host)
        ),
        "ort dynamic uint8 per channel": dynamic_of_ort(QuantType.QUInt8, per_channel=True),
        "ort dynamic int8 per channel": dynamic_of_ort(QuantType.QInt8, per_channel=True),
        "ort dynamic int8 (its default)": dynamic_of_ort(QuantType.QInt8, per_channel=False),
        "qcore int8 weights, qdq": weights(bits=8, form="qdq", block_size=None),
        "qcore float16": ours(lambda m: to_float16(m, Float16Step())),
    }
    for bits in (4, 8):
        for symmetric in (True, False):
            kind = f"{bits} bits {'symmetric' if symmetric else 'asymmetric'}"
            made[f"qcore nbits {kind}"] = weights(bits=bits, symmetric=symmetric, operators=["MatMul"])
            made[f"ort nbits {kind}"] = nbits_of_ort(bits, symmetric=symmetric)
    return made


def measure(proto: onnx.ModelProto, shape: EncoderShape, budget_s: float) -> dict[str, dict[str, float]]:
    files = {"float": proto.SerializeToString()}
    seconds = {"float": 0.0}
    for name, make in candidates().items():
        start = time.perf_counter()
        files[name] = make(proto)
        seconds[name] = time.perf_counter() - start
    loaded = {name: ort.load(raw, threads=1) for name, raw in files.items()}
    x = {"x": encoder_input(shape, n=8)}
    outputs = {name: np.asarray(model.predict(x)["y"], np.float64) for name, model in loaded.items()}
    latencies = ort.measure_latency(list(loaded.values()), {"x": x["x"][:1]}, budget_s=budget_s)
    p50 = {name: latency.p50 for name, latency in zip(loaded, latencies, strict=True)}
    return {
        name: {
            "size_ratio": round(len(raw) / len(files["float"]), 4),
            "latency_ms": round(p50[name], 3),
            "latency_ratio": round(p50[name] / p50["float"], 3),
            "sqnr_db": round(min(sqnr_db(outputs["float"], outputs[name]), 300.0), 2),
            "made_in_s": round(seconds[name], 2),
        }
        for name, raw in files.items()
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of latency measurement")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = EncoderShape(
        layers=options.layers,
        width=options.width,
        heads=6,
        hidden=4 * options.width,
        sequence=options.sequence,
        classes=256,  # an SQNR over few outputs is noise
    )
    results = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
        "model": f"{shape.layers} layers, width {shape.width}, sequence {shape.sequence}",
        "rows": measure(encoder(0, shape), shape, options.budget),
    }
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
