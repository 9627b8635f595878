"""Admission: is this ONNX file something that a device may load? Read as wire format, without onnx or protobuf.

The gate asks before it signs, and the device asks again before it loads. A lenient parser is what an attacker wants, so
this one knows every field of ONNX and takes nothing else: a field it does not know, one that is there twice (two models
one after the other), a tensor whose bytes are not its shape, a file it points to, an operator of a domain that nobody
allowed. It never copies a weight, and a budget of fields bounds the time that any bytes can take.

Standard library only, because the device imports it. Source: onnx.proto3 of ONNX 1.23 (IR version 14) and the protobuf
wire format (protobuf.dev, "Encoding"); `tests/qcore/release/test_admission.py` compares the tables with onnx's own.
"""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qcore.errors import ModelError

MAX_MODEL_BYTES = (1 << 31) - 1
MAX_DEPTH = 32
MAX_RANK = 64
MAX_FIELDS = 4_000_000
"""Fields of the whole file: about ten seconds of reading at most; a network of 3000 nodes has 60,000."""
MAX_CONSTANT_BYTES = 1 << 28
"""What a ConstantOfShape whose shape stands in the file may make of a few bytes."""
MIN_OPSET, MAX_OPSET = 13, 28
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_EXTERNAL = 1  # TensorProto.DataLocation


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """What a model may hold: domains of operators, versions of the standard operators, control flow, and its size."""

    domains: frozenset[str] = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
    opsets: tuple[int, int] = (MIN_OPSET, MAX_OPSET)
    control_flow: bool = False
    max_bytes: int = MAX_MODEL_BYTES


class Field(NamedTuple):
    """A field of a message: its name, its wire type (a scalar's own, not that of packed ones), and its message."""

    name: str
    wire: int
    many: bool = False
    message: str = ""
    text: bool = False


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _int(name: str, *, many: bool = False) -> Field:
    return Field(name, _VARINT, many)


def _bytes(name: str, *, many: bool = False) -> Field:
    return Field(name, _BYTES, many)


def _text(name: str, *, many: bool = False) -> Field:
    return Field(name, _BYTES, many, text=True)


def _one(name: str, message: str) -> Field:
    return Field(name, _BYTES, message=message)


def _all(name: str, message: str) -> Field:
    return Field(name, _BYTES, many=True, message=message)


_DOC, _PROPS = _text("doc_string"), _all("metadata_props", "StringStringEntryProto")
MESSAGES: Mapping[str, Mapping[int, Field]] = {
    "ModelProto": {
        1: _int("ir_version"),
        2: _text("producer_name"),
        3: _text("producer_version"),
        4: _text("domain"),
        5: _int("model_version"),
        6: _DOC,
        7: _one("graph", "GraphProto"),
        8: _all("opset_import", "OperatorSetIdProto"),
        14: _PROPS,
        25: _all("functions", "FunctionProto"),
    },
    "OperatorSetIdProto": {1: _text("domain"), 2: _int("version")},
    "StringStringEntryProto": {1: _text("key"), 2: _text("value")},
    "GraphProto": {
        1: _all("node", "NodeProto"),
        2: _text("name"),
        5: _all("initializer", "TensorProto"),
        10: _DOC,
        11: _all("input", "ValueInfoProto"),
        12: _all("output", "ValueInfoProto"),
        13: _all("value_info", "ValueInfoProto"),
        14: _all("quantization_annotation", "TensorAnnotation"),
        16: _PROPS,
    },
    "NodeProto": {
        1: _text("input", many=True),
        2: _text("output", many=True),
        3: _text("name"),
        4: _text("op_type"),
        5: _all("attribute", "AttributeProto"),
        6: _DOC,
        7: _text("domain"),
        8: _text("overload"),
        9: _PROPS,
    },
    "AttributeProto": {
        1: _text("name"),
        2: Field("f", _FIXED32),
        3: _int("i"),
        4: _bytes("s"),
        5: _one("t", "TensorProto"),
        6: _one("g", "GraphProto"),
        7: Field("floats", _FIXED32, many=True),
        8: _int("ints", many=True),
        9: _bytes("strings", many=True),
        10: _all("tensors", "TensorProto"),
        11: _all("graphs", "GraphProto"),
        13: _DOC,
        14: _one("tp", "TypeProto"),
        15: _all("type_protos", "TypeProto"),
        20: _int("type"),
        21: _text("ref_attr_name"),
    },
    "TensorProto": {
        1: _int("dims", many=True),
        2: _int("data_type"),
        4: Field("float_data", _FIXED32, many=True),
        5: _int("int32_data", many=True),
        6: _bytes("string_data", many=True),
        7: _int("int64_data", many=True),
        8: _text("name"),
        9: _bytes("raw_data"),
        10: Field("double_data", _FIXED64, many=True),
        11: _int("uint64_data", many=True),
        12: _DOC,
        13: _all("external_data", "StringStringEntryProto"),
        14: _int("data_location"),
        16: _PROPS,
    },
    "FunctionProto": {
        1: _text("name"),
        4: _text("input", many=True),
        5: _text("output", many=True),
        6: _text("attribute", many=True),
        7: _all("node", "NodeProto"),
        8: _DOC,
        9: _all("opset_import", "OperatorSetIdProto"),
        10: _text("domain"),
        11: _all("attribute_proto", "AttributeProto"),
        12: _all("value_info", "ValueInfoProto"),
        13: _text("overload"),
        14: _PROPS,
    },
    "TensorAnnotation": {
        1: _text("tensor_name"),
        2: _all("quant_parameter_tensor_names", "StringStringEntryProto"),
    },
    "ValueInfoProto": {1: _text("name"), 2: _one("type", "TypeProto"), 3: _DOC, 4: _PROPS},
    "TypeProto": {
        1: _one("tensor_type", "Tensor"),
        4: _one("sequence_type", "Sequence"),
        6: _text("denotation"),
        9: _one("optional_type", "Optional"),
    },
    "Tensor": {1: _int("elem_type"), 2: _one("shape", "TensorShapeProto")},
    "Sequence": {1: _one("elem_type", "TypeProto")},
    "Optional": {1: _one("elem_type", "TypeProto")},
    "TensorShapeProto": {1: _all("dim", "Dimension")},
    "Dimension": {1: _int("dim_value"), 2: _text("dim_param"), 3: _text("denotation")},
}
"""Every field that is admitted, by number. Of ONNX's own are left out, and so refused: training_info, sparse tensors,
maps, opaque types, segments of tensors, and configurations for several devices."""

_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),  # (u)int8, bool, float8
    **dict.fromkeys((4, 5, 10, 16), 16),  # (u)int16, float16, bfloat16
    **dict.fromkeys((1, 6, 12), 32),  # float, (u)int32
    **dict.fromkeys((7, 11, 13, 14), 64),  # (u)int64, double, complex64
    15: 128,  # complex128
    **dict.fromkeys((27, 28), 6),  # float6
    **dict.fromkeys((21, 22, 23), 4),  # (u)int4, float4
    **dict.fromkeys((25, 26), 2),  # (u)int2
}
_STRING = 8
_TYPED = {
    **dict.fromkeys((1, 14), "float_data"),
    **dict.fromkeys((11, 15), "double_data"),
    7: "int64_data",
    **dict.fromkeys((12, 13), "uint64_data"),
    _STRING: "string_data",
}
"""The field that holds elements of a type where `raw_data` does not; `int32_data` for all others."""
_STORES = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")

Message = dict[str, list[Any]]
"""Values of a message by field; of repeated numbers the packed bytes, or single ones."""


def admit_file(path: Path, allowance: Allowance | None = None) -> None:
    """Return if the model in the file `path` may be loaded; its weights do not come into memory.

    Raises:
        ModelError: as `admit`.
        OSError: the file cannot be read.
    """
    with path.open("rb") as f:
        if not path.stat().st_size:
            raise ModelError(f"{path.name} is empty; get it again from where it was built")
        admit(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), path.name, allowance)


def admit(model: bytes | mmap.mmap, name: str = "model.onnx", allowance: Allowance | None = None) -> None:
    """Return if `model` may be loaded.

    Args:
        model: the bytes of the file.
        name: what messages call it.
        allowance: what it may hold; default: any standard network without control flow.

    Raises:
        ModelError: with the first thing that is not admitted.
    """
    allowed = allowance or Allowance()
    if not 0 < len(model) <= allowed.max_bytes:
        raise ModelError(f"{name} has {len(model)} bytes; admitted: 1 to {allowed.max_bytes}; make it smaller")
    try:
        root = _Reader(memoryview(model)).message("ModelProto", 0, len(model), 0)
        _admit_model(root, allowed)
    except _Refused as e:
        raise ModelError(f"{name} is not admitted: {e}") from e


class _Refused(Exception):  # noqa: N818 - a refusal is a decision, not a fault
    """What is not admitted, and what to do."""


_BROKEN = "it is damaged, or no ONNX file; export it again"


class _Reader:
    """Messages read from the bytes of one file, each field once."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.left = MAX_FIELDS

    def message(self, kind: str, start: int, end: int, depth: int) -> Message:
        """Return the fields of the message `kind` in bytes `start` to `end - 1`."""
        if depth > MAX_DEPTH:
            raise _Refused(f"messages in messages, more than {MAX_DEPTH} deep; export it without nested subgraphs")
        known, found = MESSAGES[kind], Message()
        place = start
        while place < end:
            self.left -= 1
            if self.left < 0:
                raise _Refused(f"more than {MAX_FIELDS} fields; store tensors as raw_data")
            key, place = self.varint(place, end)
            field, wire = known.get(key >> 3), key & 7
            if field is None:
                raise _Refused(f"{kind} has field {key >> 3}, which is not admitted; {_BROKEN}")
            value, place = self.value(kind, field, (wire, place, end), depth)
            values = found.setdefault(field.name, [])
            if values and not field.many:
                raise _Refused(f"{kind} holds {field.name} twice, as two files in one do; {_BROKEN}")
            values.append(value)
        return found

    def value(self, kind: str, field: Field, at: tuple[int, int, int], depth: int) -> tuple[Any, int]:
        """Return the value at wire type, place and end `at`, and the place behind it."""
        wire, place, end = at
        packed = wire == _BYTES and field.many and field.wire != _BYTES
        if wire != field.wire and not packed:
            raise _Refused(f"{kind}.{field.name} is of wire type {wire}, expected {field.wire}; {_BROKEN}")
        if wire == _VARINT:
            return self.varint(place, end)
        length = {_FIXED32: 4, _FIXED64: 8}.get(wire)
        if length is None:
            length, place = self.varint(place, end)
        if length > end - place:
            raise _Refused(f"{kind}.{field.name} is cut short; {_BROKEN}")
        stop = place + length
        if field.message:
            return self.message(field.message, place, stop, depth + 1), stop
        value = self.data[place:stop]
        return (_decoded(kind, field, value) if field.text else value), stop

    def varint(self, place: int, end: int) -> tuple[int, int]:
        """Return the number at `place`, below 2^64, and the place behind it."""
        result, shift, data = 0, 0, self.data
        while place < end and shift < 64:
            byte = data[place]
            result |= (byte & 0x7F) << shift
            place += 1
            if byte < 0x80:
                if result >= 1 << 64:
                    break
                return result, place
            shift += 7
        raise _Refused(f"a number at byte {place} does not end; {_BROKEN}")


def _decoded(kind: str, field: Field, value: memoryview) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as e:
        raise _Refused(f"{kind}.{field.name} is not UTF-8; {_BROKEN}") from e


def _first(message: Message, name: str, default: Any) -> Any:
    return message.get(name, [default])[0]


def _sizes(message: Message, name: str) -> list[int]:
    """Return repeated integers, packed or not, as 64-bit signed ones: sizes of a tensor, which are few."""
    found: list[int] = []
    values = message.get(name, [])
    if len(values) > MAX_RANK or any(not isinstance(v, int) and len(v) > MAX_RANK * 10 for v in values):
        raise _Refused(f"{name} holds more than {MAX_RANK} sizes; {_BROKEN}")
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        reader, place = _Reader(value), 0
        while place < len(value):
            number, place = reader.varint(place, len(value))
            found.append(number)
    return [n - (1 << 64) if n >= 1 << 63 else n for n in found]


def _admit_model(model: Message, allowed: Allowance) -> None:
    graph = _first(model, "graph", None)
    if graph is None or not graph.get("output"):
        raise _Refused(f"it has no graph with outputs; {_BROKEN}")
    functions = model.get("functions", [])
    own = {_first(f, "domain", "") for f in functions}
    domains = allowed.domains | (own - {""})
    imports = [i for m in (model, *functions) for i in m.get("opset_import", [])]
    if not imports:
        raise _Refused(f"it imports no operators; {_BROKEN}")
    for entry in imports:
        _admit_opset(_first(entry, "domain", ""), _first(entry, "version", 0), allowed, domains)
    for nodes, initializers in _scopes(model):
        _admit_scope(nodes, initializers, allowed, domains)


def _admit_opset(domain: str, version: int, allowed: Allowance, domains: frozenset[str]) -> None:
    if domain not in domains:
        raise _Refused(f"it imports operators of {domain!r}; admitted: {_shown(domains)}; export it with those")
    low, high = allowed.opsets
    if domain in ("", "ai.onnx") and not low <= version <= high:
        raise _Refused(f"it uses opset {version}; admitted: {low} to {high}; convert it with onnx.version_converter")


def _scopes(model: Message) -> Iterator[tuple[Sequence[Message], Sequence[Message]]]:
    """Yield nodes and initializers of the graph, of every function, and of every graph within their nodes."""
    open_scopes = [_first(model, "graph", {}), *model.get("functions", [])]
    while open_scopes:
        scope = open_scopes.pop()
        nodes = scope.get("node", [])
        yield nodes, scope.get("initializer", [])
        attributes = [a for node in nodes for a in node.get("attribute", [])]
        attributes += scope.get("attribute_proto", [])
        open_scopes += [g for a in attributes for g in (*a.get("g", []), *a.get("graphs", []))]


def _admit_scope(
    nodes: Sequence[Message], initializers: Sequence[Message], allowed: Allowance, domains: frozenset[str]
) -> None:
    tensors: dict[str, Message] = {}
    for tensor in initializers:
        _admit_tensor(tensor)
        name = _first(tensor, "name", "")
        if not name or name in tensors:
            raise _Refused(f"initializer {name!r} has no name, or that of another one; {_BROKEN}")
        tensors[name] = tensor
    for node in nodes:
        _admit_node(node, allowed, domains)
        tensors |= _constant(node)
        if _first(node, "op_type", "") == "ConstantOfShape":
            _admit_shape(tensors.get(_first(node, "input", "")))


def _admit_node(node: Message, allowed: Allowance, domains: frozenset[str]) -> None:
    kind, domain = _first(node, "op_type", ""), _first(node, "domain", "")
    if domain not in domains:
        raise _Refused(f"operator {kind} is of {domain!r}; admitted: {_shown(domains)}; export it with those")
    attributes = node.get("attribute", [])
    if not allowed.control_flow and (kind in CONTROL_FLOW or any(a.get("g") or a.get("graphs") for a in attributes)):
        raise _Refused(f"operator {kind} is control flow, which may not end; export it without, or declare it")
    for attribute in attributes:
        for tensor in (*attribute.get("t", []), *attribute.get("tensors", [])):
            _admit_tensor(tensor)


def _constant(node: Message) -> dict[str, Message]:
    """Return the tensor of a Constant by the name of its output."""
    if _first(node, "op_type", "") != "Constant":
        return {}
    held = [t for a in node.get("attribute", []) if _first(a, "name", "") == "value" for t in a.get("t", [])]
    return dict(zip(node.get("output", []), held, strict=False))


def _admit_tensor(tensor: Message) -> None:
    name = _first(tensor, "name", "")
    if tensor.get("external_data") or _first(tensor, "data_location", 0) == _EXTERNAL:
        raise _Refused(f"tensor {name!r} lies in another file; store the model in one file with onnx.save")
    kind, count = _first(tensor, "data_type", 0), 1
    for size in _sizes(tensor, "dims"):
        if size < 0:
            raise _Refused(f"tensor {name!r} has a dimension of {size}; {_BROKEN}")
        count *= size
    if kind != _STRING and kind not in _BITS:
        raise _Refused(f"tensor {name!r} is of data type {kind}, which is not admitted; {_BROKEN}")
    stores = [store for store in _STORES if tensor.get(store)]
    if not stores and count == 0:
        return
    if len(stores) != 1 or stores[0] not in ("raw_data", _TYPED.get(kind, "int32_data")):
        raise _Refused(f"tensor {name!r} of data type {kind} keeps its values in {stores or 'nothing'}; {_BROKEN}")
    found, wanted = _stored(tensor, stores[0]), _wanted(kind, count, stores[0])
    if found != wanted or (kind == _STRING and stores[0] == "raw_data"):
        unit = "bytes" if stores[0] == "raw_data" else "values"
        raise _Refused(f"tensor {name!r} holds {found} {unit}, its shape wants {wanted}; {_BROKEN}")


def _wanted(kind: int, count: int, store: str) -> int:
    """Return how many bytes of raw_data, or values of a typed field, `count` elements take."""
    if kind == _STRING:
        return count
    bits = _BITS[kind]
    if store == "raw_data" or bits in (2, 4):  # several of these share a value of int32_data as they share a byte
        return -(-count * bits // 8)
    return count * 2 if kind in (14, 15) else count  # complex: real and imaginary part


def _stored(tensor: Message, store: str) -> int:
    values = tensor[store]
    match store:
        case "raw_data":
            return len(values[0])
        case "string_data":
            return len(values)
        case "float_data":
            return sum(_whole(store, len(v), 4) for v in values)
        case "double_data":
            return sum(_whole(store, len(v), 8) for v in values)
        case _:
            return sum(1 if isinstance(v, int) else _ends(store, v) for v in values)


def _whole(store: str, length: int, size: int) -> int:
    if length % size:
        raise _Refused(f"{store} has {length} bytes, no whole number of values; {_BROKEN}")
    return length // size


_MORE = bytes(range(0x80, 0x100))


def _ends(store: str, packed: memoryview) -> int:
    """Return how many varints `packed` holds: as many as bytes without the bit that says that more follow."""
    data = bytes(packed)
    if data and data[-1] >= 0x80:
        raise _Refused(f"{store} ends within a number; {_BROKEN}")
    return len(data.translate(None, _MORE))


def _admit_shape(shape: Message | None) -> None:
    """Refuse a constant that is far larger than what stands for it, where its shape is known."""
    if shape is None:
        return
    raw = _first(shape, "raw_data", None)
    sizes = _sizes(shape, "int64_data")
    if raw is not None:
        sizes = [int.from_bytes(raw[k : k + 8], "little", signed=True) for k in range(0, len(raw), 8)]
    if (count := math.prod(sizes)) * 8 > MAX_CONSTANT_BYTES:
        raise _Refused(f"ConstantOfShape makes {count} elements; admitted: {MAX_CONSTANT_BYTES // 8}; store it smaller")


def _shown(domains: frozenset[str]) -> str:
    return ", ".join(sorted(d or "ai.onnx" for d in domains))
