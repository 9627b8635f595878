"""A quantized model as integer kernels run it, in numpy: what a file computes where no runtime has a say.

Conv, Gemm and MatMul between DequantizeLinear and QuantizeLinear, and the operators QLinearConv, QLinearMatMul, QGemm,
ConvInteger and MatMulInteger, add products of integers in 32 bits and requantize; with `saturate_pairs` they add as x86
kernels without VNNI do. All other nodes run one by one in ONNX Runtime without optimization, in float32 between DQ and
Q as they are written; so does a Conv without a Q behind it, and a layer that onnx cannot express in integers (scales of
blocks, factors of Gemm, ConvTranspose).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from qcore.errors import ModelError
from qcore.numerics.affine import Integers, QParams, quantize_array
from qcore.numerics.integer_layers import Geometry, Stored, Sums, conv_sums, matmul_sums, requantize
from qcore.numerics.windows import same_pads
from qcore.runtime.nodewise import Unit, load_unit, units_of
from qcore.runtime.ort import Loaded, Predict, Tensors, load_as_written

Array = NDArray[Any]
_QDQ = ("Conv", "Gemm", "MatMul")
_CONVOLUTIONS = ("Conv", "QLinearConv", "ConvInteger")
_ACTIVATION_DTYPES = ("uint8", "int8", "uint16", "int16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """The names of a quantized tensor, its scale, and its zero point, None where it is 0; operators of sums only
    have no scale.
    """  # noqa: D205

    values: str
    scale: str | None
    zero: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegerLayer:
    """A unit that is computed on integers.

    `bias` is added to the sums; `out` is the quantized output, None where real numbers or the sums come out; `behind`
    are nodes between the layer and that output (Relu, Clip), or simply what follows. `in_qdq` is a layer between DQ and
    Q.
    """

    node: onnx.NodeProto
    attributes: Mapping[str, Any]
    x: Operand
    w: Operand
    bias: Operand | None
    out: Operand | None
    behind: tuple[onnx.NodeProto, ...]
    in_qdq: bool
    writes: str


def load_reference(model: bytes, *, name: str = "model", saturate_pairs: bool = False) -> Loaded:
    """Return `model` ready to run on integers in numpy, slowly.

    Args:
        model: the bytes of an ONNX file, quantized in QDQ or operator form; a float model runs node by node.
        name: what messages call it.
        saturate_pairs: where constant int8 weights meet uint8 activations, add as
            `qcore.numerics.integer_layers.lost_in_pairs` says. So do layers between int8 DQ and Q: on x86 ONNX Runtime
            moves their activations up by 128, to uint8 (where it can; elsewhere it computes in float and loses less).

    Raises:
        ModelError: the runtime cannot load it, or a node holds graphs.
    """
    loaded = load_as_written(model, name=name, threads=1)
    proto = onnx.ModelProto.FromString(model)
    nested = [n for n in proto.graph.node if any(a.type in (a.GRAPH, a.GRAPHS) for a in n.attribute)]
    if nested:
        raise ModelError(
            f"{name} has node {nested[0].name or nested[0].output[0]} ({nested[0].op_type}), which holds a graph of "
            "its own; allowed here: plain nodes; export the model without control flow"
        )
    return replace(loaded, predict=_predict(proto, [o.name for o in loaded.outputs], saturate_pairs))


def integer_layers(model: onnx.ModelProto) -> tuple[IntegerLayer, ...]:
    """Return the layers of `model` that `load_reference` computes on integers, in graph order."""
    constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return tuple(layer for unit in units_of(model.graph) if (layer := _layer_of(unit, constants)) is not None)


def _predict(model: onnx.ModelProto, outputs: list[str], saturate_pairs: bool) -> Predict:
    constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    units = units_of(model.graph)
    layers = [_layer_of(unit, constants) for unit in units]
    last_use = {name: k for k, unit in enumerate(units) for name in unit.reads}
    loaded: dict[int, Predict] = {}

    def predict(fed: Tensors) -> dict[str, NDArray[np.generic]]:
        live: dict[str, Array] = dict(fed)
        for k, (unit, layer) in enumerate(zip(units, layers, strict=True)):
            if layer is not None:
                live[layer.writes] = _computed(layer, live, constants, saturate_pairs)
            else:
                given = {n: live[n] for n in unit.reads}
                if k not in loaded:
                    loaded[k] = load_unit(model, unit, constants, given, threads=1)
                live.update(loaded[k](given))
            for name in unit.reads:
                if last_use[name] == k and name not in outputs:
                    del live[name]
        return {n: live[n] if n in live else constants[n] for n in outputs}

    return predict


def _layer_of(unit: Unit, constants: Mapping[str, Array]) -> IntegerLayer | None:
    """Return `unit` as a layer on integers, or None where it has to run as it is written."""
    fed = {n.output[0]: n for n in unit.nodes if n.op_type == "DequantizeLinear"}
    chain = [n for n in unit.nodes if n.output[0] not in fed]
    if not chain or len(unit.writes) != 1:
        return None
    node, behind = chain[0], tuple(chain[1:])
    if any(name in fed for n in behind for name in n.input):
        return None  # bounds that are themselves quantized
    if node.op_type in _QDQ:
        return _between(node, behind, fed, constants)
    i = [*(name or None for name in node.input), *[None] * 9]
    match node.op_type:
        case "QLinearConv" | "QLinearMatMul":
            x, w, out, bias = _operand(*i[:3]), _operand(*i[3:6]), _operand("", *i[6:8]), i[8]
        case "QGemm":
            x, w, out, bias = _operand(*i[:3]), _operand(*i[3:6]), _operand("", *i[7:9]), i[6]
        case "ConvInteger" | "MatMulInteger":
            x, w, out, bias = _operand(i[0], None, i[2]), _operand(i[1], None, i[3]), _operand("", None, None), None
        case _:
            return None
    one_of_each = all(n is None or n not in constants or constants[n].size == 1 for n in (x.scale, x.zero))
    if not one_of_each or any(n.op_type not in ("Relu", "Clip") for n in behind):
        return None
    return IntegerLayer(
        node=node,
        attributes=_attributes(node),
        x=x,
        w=w,
        bias=None if bias is None else _operand(bias, None, None),
        out=None if out.scale is None else out,
        behind=behind,
        in_qdq=False,
        writes=unit.writes[0],
    )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _operand(values: str | None, scale: str | None, zero: str | None) -> Operand:
    return Operand(values=values or "", scale=scale, zero=zero)


def _between(
    node: onnx.NodeProto,
    behind: tuple[onnx.NodeProto, ...],
    fed: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, Array],
) -> IntegerLayer | None:
    """Return a Conv, Gemm or MatMul between DQs and a Q as a layer, or None where it is not one."""
    attributes = _attributes(node)
    x, w = (_dequantized(fed.get(name), constants) for name in node.input[:2])
    if x is None or w is None or constants[x.scale or ""].size != 1:
        return None
    channel_axis = 0 if node.op_type == "Conv" or attributes.get("transB", 0) else -1
    if not _along(fed[node.input[1]], channel_axis, constants):
        return None
    if (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
        return None
    bias = None
    if len(node.input) > 2 and node.input[2]:
        real = _operand(node.input[2], None, None)
        bias = _dequantized(fed.get(node.input[2]), constants) or real
    quantizes = bool(behind) and behind[-1].op_type == "QuantizeLinear"
    out = _quantizer(behind[-1], constants) if quantizes else None
    if out is None and (quantizes or node.op_type == "Conv"):
        return None
    return IntegerLayer(
        node=node,
        attributes=attributes,
        x=x,
        w=w,
        bias=bias,
        out=out,
        behind=behind[:-1] if quantizes else behind,
        in_qdq=True,
        writes=(behind[-1] if behind else node).output[0],
    )


def _dequantized(node: onnx.NodeProto | None, constants: Mapping[str, Array]) -> Operand | None:
    """Return what a DQ with constant parameters reads, or None where there is no such DQ."""
    if node is None or node.input[1] not in constants:
        return None
    zero = node.input[2] if len(node.input) > 2 and node.input[2] else None
    return None if zero is not None and zero not in constants else _operand(node.input[0], node.input[1], zero)


def _along(node: onnx.NodeProto, channel_axis: int, constants: Mapping[str, Array]) -> bool:
    """Say whether a DQ of weights has one scale, or one per output channel."""
    scale = constants[node.input[1]]
    attributes = {a.name: a.i for a in node.attribute}
    if attributes.get("block_size", 0) or scale.ndim > 1:
        return False
    stored = constants.get(node.input[0])
    if scale.size == 1 or stored is None:
        return scale.size == 1
    return bool(attributes.get("axis", 1) % stored.ndim == channel_axis % stored.ndim)


def _quantizer(node: onnx.NodeProto, constants: Mapping[str, Array]) -> Operand | None:
    """Return scale and zero point of a Q of 8 or 16 bits that has one of each, else None."""
    if len(node.input) < 3 or any(constants.get(n, np.zeros(0)).size != 1 for n in node.input[1:3]):
        return None
    known = constants[node.input[2]].dtype.name in _ACTIVATION_DTYPES
    return _operand("", node.input[1], node.input[2]) if known else None


def _computed(
    layer: IntegerLayer, live: Mapping[str, Array], constants: Mapping[str, Array], saturate_pairs: bool
) -> Array:
    """Return the last tensor of a layer: integers with an output scale, else real numbers or sums."""

    def get(name: str) -> Array:
        return live[name] if name in live else constants[name]

    x, w = _stored(layer.x, get), _stored(layer.w, get)
    sums = _sums(layer, x, w, saturate_pairs and _meets_pairs(layer, x, w, constants))
    per_channel = (-1, *[1] * (sums.ndim - 2)) if layer.node.op_type in _CONVOLUTIONS else (-1,)
    if layer.x.scale is None or layer.w.scale is None:
        return _followed(layer.behind, sums.astype(np.int32), get)
    factor = np.float32(layer.attributes.get("alpha", 1.0) if layer.node.op_type == "QGemm" else 1.0)
    scale = (factor * get(layer.x.scale).reshape(()) * get(layer.w.scale).reshape(per_channel)).astype(np.float32)
    bias = None if layer.bias is None else get(layer.bias.values)
    if bias is not None:
        bias = bias.reshape(per_channel) if layer.node.op_type in _CONVOLUTIONS else bias
        if bias.dtype == np.int32 and _in_units_of(layer, scale, get):
            sums = (sums + bias).astype(np.int32).astype(np.int64) if x.values.itemsize == 1 else sums + bias
            bias = None
        elif bias.dtype == np.int32 and layer.bias is not None and layer.bias.scale is not None:
            bias = bias.astype(np.float32) * get(layer.bias.scale).reshape(per_channel)
    if layer.out is None:
        real = sums.astype(np.float32) * scale
        return _followed(layer.behind, real if bias is None else real + bias, get)
    return _requantized(layer, sums, scale, bias, get)


def _stored(operand: Operand, get: Any) -> Stored:
    values = get(operand.values)
    if values.dtype.kind not in "iu":  # int4 of ml_dtypes
        values = values.astype(np.int8)
    zero = np.zeros((), np.int64) if operand.zero is None else get(operand.zero).astype(np.int64)
    return Stored(values=values, zero=zero.reshape(()) if zero.size == 1 else zero)


def _meets_pairs(layer: IntegerLayer, x: Stored, w: Stored, constants: Mapping[str, Array]) -> bool:
    """Say whether ONNX Runtime runs the layer with uint8 activations and constant int8 weights on x86."""
    if layer.w.values not in constants or w.values.dtype != np.int8:
        return False
    if layer.node.op_type not in _CONVOLUTIONS and w.values.ndim != 2:
        return False
    bias = None if layer.bias is None else constants.get(layer.bias.values)
    if layer.node.op_type == "Gemm" and bias is not None and bias.dtype != np.int32:
        return False  # it runs in float; float biases of Conv become integers
    moved_up = x.values.dtype == np.int8 and layer.in_qdq and not layer.behind
    return moved_up or x.values.dtype == np.uint8


def _sums(layer: IntegerLayer, x: Stored, w: Stored, saturates: bool) -> Sums:
    if layer.node.op_type not in _CONVOLUTIONS:
        x, w = (
            replace(side, values=side.values.T) if layer.attributes.get(flag, 0) else side
            for side, flag in ((x, "transA"), (w, "transB"))
        )
        return matmul_sums(x, w, saturate_pairs=saturates)
    kernel = w.values.shape[2:]
    groups = int(layer.attributes.get("group", 1))
    geometry = _geometry(layer.attributes, kernel, x.values.shape[2:])
    return conv_sums(x, w, geometry, groups, saturate_pairs=saturates)


def _geometry(attributes: Mapping[str, Any], kernel: tuple[int, ...], size: tuple[int, ...]) -> Geometry:
    ones = (1,) * len(kernel)
    strides, dilations = (tuple(attributes.get(name) or ones) for name in ("strides", "dilations"))
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    pads = tuple(attributes.get("pads") or (0,) * (2 * len(kernel))) if mode == "NOTSET" else (0,) * (2 * len(kernel))
    pairs = tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    if mode.startswith("SAME"):
        axes = zip(size, kernel, strides, dilations, strict=True)
        pairs = tuple(same_pads(*axis, upper=mode == "SAME_UPPER") for axis in axes)
    return Geometry(kernel=kernel, strides=strides, dilations=dilations, pads=pairs)


def _in_units_of(layer: IntegerLayer, scale: NDArray[np.float32], get: Any) -> bool:
    """Say whether the integers of the bias count steps of `scale`, as kernels assume."""
    assert layer.bias is not None  # noqa: S101 - the caller has looked
    if layer.bias.scale is None:
        return True
    return bool(np.allclose(get(layer.bias.scale).reshape(-1), scale.reshape(-1), rtol=1e-6, atol=0.0))


def _requantized(layer: IntegerLayer, sums: Sums, scale: NDArray[np.float32], bias: Array | None, get: Any) -> Integers:
    assert layer.out is not None and layer.out.scale and layer.out.zero  # noqa: S101, PT018 - the plan has looked
    out_scale, zero = get(layer.out.scale).astype(np.float32).reshape(()), get(layer.out.zero)
    info = np.iinfo(zero.dtype)
    q = QParams(
        scale=out_scale,
        zero_point=zero.astype(np.int32).reshape(()),
        dtype=zero.dtype.name,
        qmin=int(info.min),
        qmax=int(info.max),
    )
    if bias is None:
        result = requantize(sums, (scale / out_scale).astype(np.float32), int(zero.reshape(())), zero.dtype.name)
    else:
        result = quantize_array((sums.astype(np.float32) * scale + bias).astype(np.float32), q)
    if not layer.in_qdq:
        return _followed(layer.behind, result, get)
    for node in layer.behind:  # Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b)): rounding and saturating keep the order
        for bound, cut in _bounds(node, get):
            result = cut(result, quantize_array(np.asarray(bound, np.float32).reshape(()), q))
    return result


def _followed(behind: tuple[onnx.NodeProto, ...], value: Array, get: Any) -> Array:
    for node in behind:
        for bound, cut in _bounds(node, get):
            value = cut(value, np.asarray(bound, value.dtype).reshape(()))
    return value


def _bounds(node: onnx.NodeProto, get: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a Relu or Clip holds its input to, and the function that does."""
    if node.op_type == "Relu":
        yield 0.0, np.maximum
        return
    for name, cut in zip(node.input[1:3], (np.maximum, np.minimum), strict=False):
        if name:
            yield get(name), cut
