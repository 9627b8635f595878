"""AIMET for ONNX: quantization simulation, CLE, sequential MSE, AdaRound, exported as QDQ."""

import json
import tempfile
from pathlib import Path

import aimet_onnx
import onnx
from aimet_onnx.common import quantsim_config
from aimet_onnx.cross_layer_equalization import equalize_model
from protocol import Job, input_name, serve

SCHEMES = {"default": "min_max", "min-max": "min_max", "sqnr": "tf_enhanced"}
ADAROUND_ITERATIONS = 2000


def configuration(job: Job, folder: Path) -> str:
    """Write its default simulation rules with the granularity and symmetry of the job; return the path."""
    name = "default_config_per_channel.json" if job.options["weights"] == "per-channel" else "default_config.json"
    rules = json.loads((Path(quantsim_config.__file__).parent / name).read_text())
    if job.options["symmetric"]:
        rules["defaults"]["ops"]["is_symmetric"] = "True"
        rules["defaults"]["unsigned_symmetric"] = "False"
    path = folder / "rules.json"
    path.write_text(json.dumps(rules))
    return str(path)


def with_constant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put the bounds of every Clip into Constant nodes: where they are initializers its CLE overlooks ReLU6."""
    graph = model.graph
    bounds = {name for node in graph.node if node.op_type == "Clip" for name in node.input[1:]}
    tensors = [t for t in graph.initializer if t.name in bounds]
    for tensor in tensors:
        graph.initializer.remove(tensor)
        graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    return model


def quantize(job: Job) -> None:
    """Write the quantized model."""
    recovery = job.recovery("cle", "seq-mse", "adaround", "adaround-10k")
    scheme = SCHEMES[job.only("ranges", *SCHEMES)]
    bits = job.only("weight_bits", 8, 4)
    model = onnx.load(job.model)
    if "cle" in recovery:
        model = with_constant_nodes(model)
        equalize_model(model)
    feeds = list(job.feeds(input_name(job.model)))
    with tempfile.TemporaryDirectory() as folder:
        sim = aimet_onnx.QuantizationSimModel(
            model,
            param_type=f"int{bits}",
            activation_type="int8",
            quant_scheme=scheme,
            config_file=configuration(job, Path(folder)),
        )
        if "seq-mse" in recovery:
            aimet_onnx.apply_seq_mse(sim, feeds)
        if "adaround" in recovery:
            aimet_onnx.apply_adaround(sim, feeds, num_iterations=ADAROUND_ITERATIONS)
        if "adaround-10k" in recovery:
            aimet_onnx.apply_adaround(sim, feeds, num_iterations=10_000)
        sim.compute_encodings(feeds)
        signed = "signed" if job.options["activations"] == "int8" else "unsigned"
        exported = sim.to_onnx_qdq(prequantize_constants=True, export_int32_bias=True, force_activation_as=signed)
    onnx.save(exported, job.output)


if __name__ == "__main__":
    serve(quantize, f"aimet-onnx {aimet_onnx.__version__}")
