import json

import numpy as np
import onnx
import pytest
from models import conv_net, save, write_data
from quantizing import profile, quantized, run, samples, written

from qcore import steps
from qcore.data.dataset import Batch
from qcore.errors import ModelError
from qcore.graph.io import serialize_model
from qcore.numerics.affine import dequantize_array, quantize_array
from qcore.numerics.error import sqnr_db
from qcore.numerics.integer_io import INTEGER_IO_KEY, read_integer_io
from qcore.runtime import ort


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({}, np.uint8), ({"activations": "uint16"}, np.uint16), ({"activations": "int8"}, np.int8)],
)
def test_inputs_and_outputs_are_integers_whose_meaning_is_in_the_metadata(fields, dtype):
    proto = conv_net()
    target = profile("x86-avx2", integer_io=True, **fields)
    data = serialize_model(quantized(proto, target).model)
    onnx.checker.check_model(onnx.ModelProto.FromString(data), full_check=True)
    loaded = ort.load(data)
    assert [(p.name, p.dtype) for p in (*loaded.inputs, *loaded.outputs)] == [("x", dtype), ("y", dtype)]
    x = samples(proto)
    found = read_integer_io({p.key: p.value for p in onnx.ModelProto.FromString(data).metadata_props})
    raw = loaded.predict({"x": quantize_array(x, found.inputs["x"])})["y"]
    real = dequantize_array(raw, found.outputs["y"])
    assert sqnr_db(run(proto.SerializeToString(), x), real) > 25
    np.testing.assert_array_equal(ort.on_samples(loaded)({"x": x})["y"], real)
    batch = Batch(index=np.arange(len(x)), x={"": x}, y=None)
    np.testing.assert_array_equal(ort.outputs(loaded, loaded.predict(ort.feeds(loaded, batch)))["y"], real)


def test_the_operator_form_has_no_float_at_all():
    file = quantized(conv_net(), profile("x86-avx2", integer_io=True), form="qoperator").model
    kinds = {t.dtype.name for v in file.graph.initializers.values() if (t := v.const_value) is not None and t.size > 6}
    assert {n.op_type for n in file.graph} & {"QuantizeLinear", "DequantizeLinear"} == set()
    assert kinds <= {"INT8", "UINT8", "INT32"}


def test_it_is_evaluated_against_the_float_model_like_any_other(tmp_path):
    proto = conv_net()
    model, data = save(proto, tmp_path / "m.onnx"), write_data(tmp_path, proto)
    (tmp_path / "io.yaml").write_text(profile("x86-avx2", name="io", integer_io=True).model_dump_json())
    out = tmp_path / "q.onnx"
    steps.compress(model=model, data=data, out=out, target=str(tmp_path / "io.yaml"))
    report = steps.evaluate(candidate=out, baseline=model, data=data, out=tmp_path / "r.json")
    assert report.metrics["output_sqnr_db"] > 20
    assert report.metrics["agreement"] > 0.9
    assert steps.lint(model=out, target=str(tmp_path / "io.yaml")).findings == ()


def test_damaged_metadata_is_refused():
    file = written(quantized(conv_net(), profile("x86-avx2", integer_io=True)))
    entry = next(p for p in file.metadata_props if p.key == INTEGER_IO_KEY)
    assert set(json.loads(entry.value)) == {"inputs", "outputs"}
    entry.value = json.dumps({"inputs": {"x": {}}})
    with pytest.raises(ModelError, match="is damaged"):
        ort.load(file.SerializeToString())


def test_a_float_model_has_none():
    assert ort.load(conv_net().SerializeToString()).integer_io.inputs == {}
