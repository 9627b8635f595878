"""Weight-only quantization: integer weights in the file, float activations; no calibration and no data.

Matrices are quantized block by block (`form: nbits`, one node of com.microsoft) or behind a standard DequantizeLinear
(`form: qdq`); convolutions behind a DequantizeLinear, per channel, or with 4 bits in blocks of input channels;
embedding tables row by row, so that only the rows that are looked up are dequantized. Files shrink to about a quarter
or an eighth; whether the model is faster depends on the runtime's kernels.

Source: ONNX DequantizeLinear-13 and -21; com.microsoft MatMulNBits-1 and GatherBlockQuantized-1.
"""

from dataclasses import dataclass
from typing import Literal, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qcore.config import Config
from qcore.errors import ModelError
from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, fresh_name, replace_node
from qcore.graph.opset import raise_opset
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, float_attribute, int_attribute, node_name
from qcore.numerics.blocks import Blocks, BlockScheme, pack_nibbles, quantize_blocks

Operator = Literal["MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"]
Written = Literal["nbits", "blocks", "channels", "rows", "row-blocks"]
Float32 = NDArray[np.float32]
_Key = tuple[ir.Value | None, Written, bool, float]  # weights, form, orientation, alpha

_MICROSOFT = "com.microsoft"
_NODE_BYTES = 200  # what a DequantizeLinear and two more tensors add to a file


class QuantizeWeightsStep(Config):
    """Options of the recipe step `quantize-weights`.

    `operators` are quantized, `exclude` names nodes that are not. `block_size` counts weights along the input
    channels that share a scale; null is one scale per output channel, which only `form: qdq` can write.
    `accuracy_level` is what MatMulNBits multiplies in: 4 int8, 1 float32, 0 the runtime's choice. `scales: mse`
    searches the least squared error. `conv_bits` is for convolutions, null as `bits`; depthwise ones keep
    `depthwise_bits`: they hold few weights and lose the most.
    """

    method: Literal["quantize-weights"] = "quantize-weights"
    operators: tuple[Operator, ...] = Field(default=("MatMul", "Gemm", "Conv", "ConvTranspose"), min_length=1)
    bits: Literal[4, 8] = 4
    block_size: Literal[16, 32, 64, 128] | None = 32
    form: Literal["nbits", "qdq"] = "nbits"
    conv_bits: Literal[4, 8] | None = None
    depthwise_bits: Literal[4, 8] = 8
    symmetric: bool = True
    accuracy_level: Literal[0, 1, 4] = 4
    scales: Literal["mse", "min-max"] = "mse"
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _nbits_has_blocks(self) -> Self:
        if self.form == "nbits" and self.block_size is None:
            raise ValueError("form nbits needs a block_size; allowed: 16, 32, 64, 128; or form qdq")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """A node, the input that holds its weights, these weights, and how they will be written in how many bits."""

    node: ir.Node
    index: int
    weight: Float32
    written: Written
    bits: Literal[4, 8]


def quantize_weights(model: ir.Model, step: QuantizeWeightsStep) -> Rewrite:
    """Return `model` with integer weights; `changed` names the nodes that read them.

    The model is raised to opset 21 where its weights need 4-bit tensors or blocks in standard operators.

    Raises:
        ModelError: no node can be quantized, `exclude` names no node, or the opset cannot be raised.
    """
    out = editable_copy(model)
    layers, skipped = _plan(out.graph, step)
    if any(_needs_opset_21(layer) for layer in layers) and model.opset_imports.get("", 0) < 21:
        out = editable_copy(raise_opset(model, 21))
        layers, skipped = _plan(out.graph, step)
    if not layers:
        reasons = sorted({s.reason for s in skipped}) or [f"it has no {', '.join(step.operators)}"]
        raise ModelError(f"no weights can be quantized: {'; '.join(reasons[:3])}")
    done: dict[_Key, ir.Value | tuple[ir.Value, ...]] = {}
    for layer in layers:
        _write(out.graph, layer, step, done)
    if any(layer.written in ("nbits", "row-blocks") for layer in layers):
        out.opset_imports.setdefault(_MICROSOFT, 1)
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(node_name(x.node) for x in layers), skipped=tuple(skipped))


def _plan(graph: ir.Graph, step: QuantizeWeightsStep) -> tuple[list[_Layer], list[Skipped]]:
    """Return the layers to write in graph order, and the wanted nodes that are left alone."""
    nodes = [n for n in graph if n.op_type in step.operators and n.domain == ""]
    missing = set(step.exclude) - {node_name(n) for n in graph}
    if missing:
        raise ModelError(f"exclude names node {min(missing)!r}, which does not exist; names are those of the file")
    layers: list[_Layer] = []
    skipped: list[Skipped] = []
    for node in nodes:
        found = _layer(node, step)
        if isinstance(found, str):
            skipped.append(Skipped(node=node_name(node), op_type=node.op_type, reason=found))
        else:
            layers.append(found)
    handled = {layer.node for layer in layers}
    for layer in list(layers):
        value = layer.node.inputs[layer.index]
        others = [] if value is None else [node_name(n) for n, _ in value.uses() if n not in handled]
        if others or (value is not None and value.is_graph_output()):
            layers.remove(layer)
            reason = f"{[*others, 'the caller'][0]} reads its weights too and stays float: the file would grow"
            skipped.append(Skipped(node=node_name(layer.node), op_type=layer.node.op_type, reason=reason))
    return layers, skipped


def _layer(node: ir.Node, step: QuantizeWeightsStep) -> _Layer | str:
    """Return how the weights of `node` will be written, or why they stay float."""
    if node_name(node) in step.exclude:
        return "excluded by the recipe"
    index = 0 if node.op_type == "Gather" else 1
    weight = constant_array(node.inputs[index])
    if weight is None:
        return "its weights are no constants"
    if weight.dtype != np.float32:
        return f"its weights are {weight.dtype}, not float32"
    if weight.ndim < 2:
        return f"its weights have {weight.ndim} dimensions; at least 2 are needed"
    if not np.isfinite(weight).all():
        return "its weights hold NaN or infinity"
    written = _form(node, weight, step)
    if (reason := _form_refusal(node, weight, written, step)) is not None:
        return reason
    bits = _bits(node, weight, step)
    if _stored_bytes(weight, written, bits, step) + _NODE_BYTES >= weight.nbytes:
        return f"{weight.size} weights would not get smaller"
    return _Layer(node=node, index=index, weight=weight, written=written, bits=bits)


def _form(node: ir.Node, weight: Float32, step: QuantizeWeightsStep) -> Written:
    if node.op_type == "Gather":
        return "row-blocks" if step.form == "nbits" else "rows"
    if node.op_type == "Conv" and _bits(node, weight, step) == 4 and step.block_size is not None:
        return "blocks" if weight.shape[1] >= step.block_size else "channels"
    if node.op_type in ("Conv", "ConvTranspose") or weight.ndim != 2 or step.block_size is None:
        return "channels"
    return "nbits" if step.form == "nbits" else "blocks"


def _form_refusal(node: ir.Node, weight: Float32, written: Written, step: QuantizeWeightsStep) -> str | None:
    """Return why `node` cannot be written in that form, or None."""
    if written in ("rows", "row-blocks"):
        return _table_refusal(node, weight, written, step)
    if written != "nbits":
        return None
    source = node.inputs[0]
    if source is not None and source.shape is not None and len(source.shape) < 2:
        return "MatMulNBits needs an input of at least 2 dimensions; use form qdq"
    if int_attribute(node, "transA", 0):
        return "MatMulNBits does not transpose its input (transA); use form qdq"
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    if has_bias and float_attribute(node, "beta", 1.0) != 1.0 and constant_array(node.inputs[2]) is None:
        return "Gemm with beta and a bias that is not a constant; use form qdq"
    return None


def _table_refusal(node: ir.Node, weight: Float32, written: Written, step: QuantizeWeightsStep) -> str | None:
    if int_attribute(node, "axis", 0) != 0 or weight.ndim != 2:
        return "it does not look up rows of a matrix"
    if written == "row-blocks" and step.block_size is not None and weight.shape[1] % step.block_size != 0:
        return f"rows of {weight.shape[1]} are not whole blocks of {step.block_size}"
    if written == "rows" and step.bits == 4:
        return "ONNX has no Gather of 4-bit tensors; use form nbits or 8 bits"
    return None


def _bits(node: ir.Node, weight: Float32, step: QuantizeWeightsStep) -> Literal[4, 8]:
    if node.op_type not in ("Conv", "ConvTranspose"):
        return step.bits
    bits = step.conv_bits or step.bits
    depthwise = int_attribute(node, "group", 1) > 1 and weight.shape[1] == 1
    return step.depthwise_bits if depthwise and bits == 4 else bits


def _needs_opset_21(layer: _Layer) -> bool:
    return layer.written == "blocks" or (layer.written == "channels" and layer.bits == 4)


def _stored_bytes(weight: Float32, written: Written, bits: int, step: QuantizeWeightsStep) -> int:
    """Return about how many bytes the integers and scales of `weight` take."""
    size, scales = weight.size, max(weight.shape[:2])
    if written in ("nbits", "blocks", "row-blocks") and step.block_size is not None:
        scales = max(weight.size // step.block_size, min(weight.shape))
        size = max(size, scales * step.block_size) if written == "nbits" else size  # the last block is filled up
    return int(size * bits // 8 + scales * (4 if step.symmetric else 5))


def _write(
    graph: ir.Graph,
    layer: _Layer,
    step: QuantizeWeightsStep,
    done: dict[_Key, ir.Value | tuple[ir.Value, ...]],
) -> None:
    """Replace the float weights of `layer`; weights that several layers share are quantized and stored once."""
    node = layer.node
    transposed = bool(int_attribute(node, "transB", 0)) or node.op_type == "ConvTranspose"
    key = (node.inputs[layer.index], layer.written, transposed, float_attribute(node, "alpha", 1.0))
    stored = done.get(key)
    match layer.written:
        case "nbits" | "row-blocks":
            if not isinstance(stored, tuple):
                stored = done[key] = _stored_blocks(graph, layer, step)
            write = _write_nbits if layer.written == "nbits" else _write_gather_blocks
            write(graph, layer, step, stored)
        case "rows":
            if not isinstance(stored, tuple):
                stored = done[key] = _stored_rows(graph, layer, step)
            _write_gather_rows(graph, layer, stored)
        case "blocks" | "channels":
            if not isinstance(stored, ir.Value):
                stored = done[key] = _dequantized(graph, layer, step)
            node.replace_input_with(layer.index, stored)


def _scheme(layer: _Layer, step: QuantizeWeightsStep, block_size: int) -> BlockScheme:
    return BlockScheme(
        bits=layer.bits,
        block_size=block_size,
        symmetric=step.symmetric,
        signed_scales=layer.written == "nbits",
        search=step.scales == "mse",
    )


def _weight_name(layer: _Layer) -> str:
    value = layer.node.inputs[layer.index]
    return str(value.name) if value is not None else node_name(layer.node)


def _stored_blocks(graph: ir.Graph, layer: _Layer, step: QuantizeWeightsStep) -> tuple[ir.Value, ...]:
    """Return initializers for integers, scales and, if asymmetric, zero points, as the contrib kernels read them."""
    size = step.block_size or 0
    rows = layer.weight
    if layer.written == "nbits":
        if not int_attribute(layer.node, "transB", 0):
            rows = rows.T
        rows = rows * np.float32(float_attribute(layer.node, "alpha", 1.0))
    b = quantize_blocks(rows, _scheme(layer, step, size))
    integers = b.integers if layer.written == "nbits" else b.integers.reshape(len(rows), -1)
    name = _weight_name(layer)
    stored = [
        add_initializer(graph, f"{name}_quantized", pack_nibbles(integers) if step.bits == 4 else integers),
        add_initializer(graph, f"{name}_scale", b.scale),
    ]
    if not step.symmetric:
        zero = pack_nibbles(b.zero_point) if step.bits == 4 else b.zero_point
        stored.append(add_initializer(graph, f"{name}_zero_point", zero))
    return tuple(stored)


def _write_nbits(graph: ir.Graph, layer: _Layer, step: QuantizeWeightsStep, stored: tuple[ir.Value, ...]) -> None:
    node = layer.node
    k, n = layer.weight.shape[::-1] if int_attribute(node, "transB", 0) else layer.weight.shape
    attributes = {"K": k, "N": n, "bits": step.bits, "block_size": step.block_size}
    if step.accuracy_level:
        attributes["accuracy_level"] = step.accuracy_level
    product = ir.node("MatMulNBits", [node.inputs[0], *stored], attributes, domain=_MICROSOFT, name=node.name)
    new, result = [product], product.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    beta = float_attribute(node, "beta", 1.0)
    if bias is not None and beta != 0.0:
        if beta != 1.0:
            array = constant_array(bias)
            assert array is not None  # noqa: S101 - _form has looked
            bias = add_initializer(graph, f"{bias.name}_scaled", array * array.dtype.type(beta))
        result.name = fresh_name(graph, f"{node_name(node)}_product")
        result.type = ir.TensorType(ir.DataType.FLOAT)
        new.append(ir.node("Add", [result, bias], name=fresh_name(graph, f"{node_name(node)}_bias")))
        result = new[-1].outputs[0]
    replace_node(graph, node, new, result)


def _write_gather_blocks(
    graph: ir.Graph, layer: _Layer, step: QuantizeWeightsStep, stored: tuple[ir.Value, ...]
) -> None:
    node = layer.node
    attributes = {"bits": step.bits, "block_size": step.block_size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [stored[0], node.inputs[1], *stored[1:]]
    looked_up = ir.node("GatherBlockQuantized", inputs, attributes, domain=_MICROSOFT, name=node.name)
    replace_node(graph, node, [looked_up], looked_up.outputs[0])


def _stored_rows(graph: ir.Graph, layer: _Layer, step: QuantizeWeightsStep) -> tuple[ir.Value, ...]:
    """Return initializers for int8 rows (V, width) and their scales (V, 1); always symmetric."""
    scheme = BlockScheme(bits=8, block_size=layer.weight.shape[1], search=step.scales == "mse")
    b = quantize_blocks(layer.weight, scheme)
    name = _weight_name(layer)
    return (
        add_initializer(graph, f"{name}_quantized", _signed(b).reshape(layer.weight.shape)),
        add_initializer(graph, f"{name}_scale", b.scale),
    )


def _write_gather_rows(graph: ir.Graph, layer: _Layer, stored: tuple[ir.Value, ...]) -> None:
    """Look up integer rows and their scales, then multiply: the table itself is never dequantized."""
    node, name = layer.node, node_name(layer.node)
    rows = ir.node("Gather", [stored[0], node.inputs[1]], {"axis": 0}, name=node.name)
    scales = ir.node("Gather", [stored[1], node.inputs[1]], {"axis": 0}, name=fresh_name(graph, f"{name}_scales"))
    cast = ir.node("Cast", [rows.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=fresh_name(graph, f"{name}_cast"))
    for value, suffix in ((rows, "rows"), (scales, "row_scales"), (cast, "rows_float")):
        value.outputs[0].name = fresh_name(graph, f"{name}_{suffix}")
    product = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=fresh_name(graph, f"{name}_dequantize"))
    replace_node(graph, node, [rows, scales, cast, product], product.outputs[0])


def _dequantized(graph: ir.Graph, layer: _Layer, step: QuantizeWeightsStep) -> ir.Value:
    """Return the float weights that a DequantizeLinear computes from new integer initializers."""
    w, name = layer.weight, _weight_name(layer)
    axis, size = _axis_and_size(layer, step)
    # The quantized axis goes last for blocks, the channel axis first for channels: blocks are runs of a row.
    rows = np.moveaxis(w, axis, -1 if size else 0)
    folded = rows.reshape(-1, w.shape[axis]) if size else rows.reshape(w.shape[axis], -1)
    b = quantize_blocks(folded, _scheme(layer, step, size or folded.shape[1]))
    integers = _signed(b) if step.symmetric else b.integers
    flat = integers.reshape(len(folded), -1)[:, : folded.shape[1]].reshape(rows.shape)
    integers = np.moveaxis(flat, -1 if size else 0, axis)
    if size:
        scale, zero = (np.moveaxis(a.reshape(*rows.shape[:-1], a.shape[-1]), -1, axis) for a in (b.scale, b.zero_point))
    else:
        scale, zero = b.scale[:, 0], b.zero_point[:, 0]
    dtype = _dtype(layer.bits, step.symmetric)
    inputs = [
        add_initializer(graph, f"{name}_quantized", integers.astype(dtype)),
        add_initializer(graph, f"{name}_scale", scale),
    ]
    if not step.symmetric:
        inputs.append(add_initializer(graph, f"{name}_zero_point", zero.astype(dtype)))
    attributes = {"axis": axis, "block_size": size} if size else {"axis": axis}
    node = ir.node("DequantizeLinear", inputs, attributes, name=fresh_name(graph, f"{name}_dequantize"))
    result = node.outputs[0]
    result.name = fresh_name(graph, f"{name}_dequantized")
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(w.shape)
    graph.insert_before(next(iter(graph)), node)
    return result


def _axis_and_size(layer: _Layer, step: QuantizeWeightsStep) -> tuple[int, int]:
    """Return the axis of DequantizeLinear, and the block size along it or 0 for one scale per index of it."""
    node, ndim = layer.node, layer.weight.ndim
    transposed = bool(int_attribute(node, "transB", 0))
    if layer.written == "blocks":
        return (1 if transposed or node.op_type == "Conv" else 0), step.block_size or 0
    match node.op_type:
        case "Conv":
            return 0, 0
        case "ConvTranspose":
            return 1, 0
        case "Gemm":
            return (0 if transposed else 1), 0
        case _:
            return ndim - 1, 0


def _dtype(bits: int, symmetric: bool) -> np.dtype[np.generic]:
    kinds = (np.int8, np.uint8) if bits == 8 else (ml_dtypes.int4, ml_dtypes.uint4)
    dtype: np.dtype[np.generic] = np.dtype(kinds[0] if symmetric else kinds[1])
    return dtype


def _signed(b: Blocks) -> NDArray[np.int8]:
    """Return the integers of symmetric blocks around zero."""
    return (b.integers.astype(np.int16) - (1 << (b.bits - 1))).astype(np.int8)
