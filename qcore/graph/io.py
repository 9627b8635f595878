"""Reading and writing ONNX files: the only place that meets ModelProto and file bytes.

Inputs are opened read-only and nothing is written beside them. A model is one self-contained file: weights in
external files would not be covered by the digest that the gate signs, so they are refused here.
"""

from pathlib import Path

import onnx
import onnx.version_converter
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qcore.canonical import Digest, sha256_bytes
from qcore.errors import ModelError
from qcore.files import write_atomic

MIN_OPSET = 13
MAX_BYTES = (1 << 31) - 1


def load_model(path: Path) -> ir.Model:
    """Return the model in the ONNX file `path`.

    Raises:
        ModelError: the file is missing, is not ONNX, is not valid, keeps weights in external files, or uses an
            opset below 13 (where per-channel DequantizeLinear does not exist).
    """
    return parse_model(read_model_bytes(path), str(path))


def read_model_bytes(path: Path) -> bytes:
    """Return the bytes of the file `path`.

    Raises:
        ModelError: the file is missing, a folder, empty, or not below 2 GiB.
    """
    if not path.exists():
        raise ModelError(f"model file {path} does not exist; check the path")
    if not path.is_file():
        raise ModelError(f"model {path} is not a file; pass one .onnx file")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise ModelError(f"model file {path} has {size} bytes; allowed: 1 to {MAX_BYTES} (2 GiB - 1)")
    try:
        return path.read_bytes()
    except OSError as e:
        raise ModelError(f"model file {path} cannot be read: {e.strerror}; check its permissions") from e


def parse_model(data: bytes, name: str) -> ir.Model:
    """Return the model in `data`; `name` is what messages call it. Raises as `load_model`."""
    return ir.serde.deserialize_model(_checked(data, name))


def check_model(data: bytes, name: str) -> None:
    """Return if `parse_model` would take `data`, without building the model. Raises as `load_model`."""
    _checked(data, name)


def _checked(data: bytes, name: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as e:
        raise ModelError(f"{name} is not an ONNX file ({len(data)} bytes, not a protobuf); pass an .onnx file") from e
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{name} is not an ONNX model (no graph in its {len(data)} bytes); pass an .onnx file")
    external = [t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        raise ModelError(
            f"{name} keeps {len(external)} weights in external files (first: {external[0]}); allowed: one "
            "self-contained file; store it with onnx.save(onnx.load(path), new_path)"
        )
    if proto.graph.sparse_initializer:
        raise ModelError(f"{name} has sparse initializers; allowed: dense weights; store them dense")
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise ModelError(
            f"{name} uses opset {opset}; allowed: {MIN_OPSET} or newer; convert it with "
            "onnx.version_converter.convert_version"
        )
    try:
        onnx.checker.check_model(data)  # the bytes: a proto would be written out once more
    except onnx.checker.ValidationError as e:
        reason = str(e).strip().splitlines()[0]
        raise ModelError(f"{name} is not a valid ONNX model: {reason}; export it again") from e
    return proto


def convert_opset(model: ir.Model, opset: int) -> ir.Model:
    """Return `model` with the operators of version `opset` of the ONNX domain; the argument is not changed.

    Raises:
        ModelError: onnx.version_converter cannot convert it.
    """
    found = model.opset_imports.get("", 0)
    if found == opset:
        return model
    try:
        proto = onnx.version_converter.convert_version(ir.serde.serialize_model(model), opset)
        onnx.checker.check_model(proto)
    except (onnx.version_converter.ConvertError, onnx.checker.ValidationError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ModelError(
            f"the model uses opset {found} and cannot be converted to {opset}, which the target wants: {reason}; "
            f"export it with opset {opset}"
        ) from e
    converted = ir.serde.deserialize_model(proto)
    converted.metadata_props.update(model.metadata_props)
    return converted


def at_opset(model: ir.Model, opset: int) -> ir.Model:
    """Return `model` written in version `opset` of the standard operators: itself if it already is.

    Raises:
        ModelError: the converter of the onnx package does not know how.
    """
    if model.opset_imports.get("") == opset:
        return model
    try:
        proto = onnx.version_converter.convert_version(ir.serde.serialize_model(model), opset)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise ModelError(f"the model cannot be written in opset {opset}: {reason}; export it in that opset") from e
    return ir.serde.deserialize_model(proto)


def serialize_model(model: ir.Model) -> bytes:
    """Return the bytes of the ONNX file of `model`; the same model gives the same bytes.

    Raises:
        ModelError: the file would be 2 GiB or more, which one protobuf cannot hold.
    """
    proto = ir.serde.serialize_model(model)
    if (size := proto.ByteSize()) > MAX_BYTES:
        raise ModelError(f"model would have {size} bytes; allowed: below 2 GiB in one file")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def save_model(model: ir.Model, path: Path) -> Digest:
    """Write `model` to `path` all at once and return the SHA-256 of the file."""
    data = serialize_model(model)
    write_atomic(path, data)
    return sha256_bytes(data)
