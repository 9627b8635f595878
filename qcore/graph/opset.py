"""A newer opset for a whole model, where a form needs one (4-bit tensors and blocks: DequantizeLinear-21)."""

import onnx
import onnx_ir as ir
from onnx import version_converter

from qcore.errors import ModelError

_IR_VERSION = {21: 10}  # the first IR version that knows the opset's types


def raise_opset(model: ir.Model, version: int) -> ir.Model:
    """Return `model` in opset `version`, or `model` itself if it is that new already; the argument is not changed.

    onnx's converter adapts operators whose meaning changed between the two (checked on all its node test cases of
    opset 13 to 20: equal outputs).

    Raises:
        ModelError: the converter has no adapter for an operator, or the model has functions of its own.
    """
    old = model.opset_imports.get("", 0)
    if old >= version:
        return model
    if model.functions:
        raise ModelError(
            f"the model has functions of its own, which cannot be raised from opset {old} to {version}; allowed: none; "
            "inline them or choose 8 bits without blocks"
        )
    try:
        proto = version_converter.convert_version(ir.serde.serialize_model(model), version)
        onnx.checker.check_model(proto)
    except (RuntimeError, version_converter.ConvertError, onnx.checker.ValidationError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ModelError(
            f"the model cannot be raised from opset {old} to {version}: {reason}; export it with a newer opset or "
            "choose 8 bits without blocks"
        ) from e
    raised = ir.serde.deserialize_model(proto)
    raised.ir_version = max(raised.ir_version, _IR_VERSION[version])
    raised.metadata_props.update(model.metadata_props)
    return raised
