"""Who teaches: a model whose outputs a student learns to give, called under the student's own names.

The teacher may be what the student was made from or any other model with the same inputs and outputs; names may differ.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.errors import ModelError
from qcore.runtime.nodewise import with_outputs
from qcore.runtime.ort import load_beside
from qcore.training.course import Arrays, Teach


def teach_of(teacher: ir.Model, student: ir.Model, features: Sequence[str]) -> Teach:
    """Return a function from inputs of `student` to what `teacher` makes of them: outputs under the student's names.

    Inputs and outputs belong together by name, or by their order where names differ.

    Args:
        teacher: any model that the runtime can run.
        student: whose names count.
        features: tensors that are returned too, under their own names.

    Raises:
        ModelError: inputs, outputs or their sizes differ, or the teacher has no tensor that `features` names.
    """
    inputs = _paired("inputs", _fed(student), _fed(teacher))
    outputs = _paired("outputs", student.graph.outputs, teacher.graph.outputs)
    known = {str(o.name) for n in teacher.graph for o in n.outputs} | {str(v.name) for v in teacher.graph.inputs}
    for name in features:
        if name not in known:
            raise ModelError(
                f"features names {name!r}, which the teacher does not have; allowed: tensors of both models"
            )
    predict = load_beside(with_outputs(teacher, features), name="the teacher").predict

    def teach(x: Mapping[str, NDArray[np.generic]]) -> Arrays:
        made = predict({theirs: x[ours] for ours, theirs in inputs.items()})
        return {**{ours: made[theirs] for ours, theirs in outputs.items()}, **{name: made[name] for name in features}}

    return teach


def _fed(model: ir.Model) -> list[ir.Value]:
    """Return the inputs of `model` that are no weights: old files list those too."""
    return [v for v in model.graph.inputs if not v.is_initializer()]


def _paired(what: str, ours: Sequence[ir.Value], theirs: Sequence[ir.Value]) -> dict[str, str]:
    """Return our names with theirs."""
    if len(ours) != len(theirs):
        raise ModelError(
            f"the teacher has {len(theirs)} {what}, the student {len(ours)}; allowed: the same; pass another teacher"
        )
    by_name = {str(v.name): v for v in theirs}
    same = set(by_name) == {str(v.name) for v in ours}
    pairs = [(v, by_name[str(v.name)] if same else w) for v, w in zip(ours, theirs, strict=True)]
    for v, w in pairs:
        _refuse_other_shape(what, v, w)
    return {str(v.name): str(w.name) for v, w in pairs}


def _refuse_other_shape(what: str, ours: ir.Value, theirs: ir.Value) -> None:
    if ours.shape is None or theirs.shape is None:
        return
    a, b = list(ours.shape), list(theirs.shape)
    differ = len(a) != len(b) or any(
        isinstance(m, int) and isinstance(n, int) and m != n for m, n in zip(a[1:], b[1:], strict=True)
    )
    if differ:
        raise ModelError(
            f"the teacher's {what} {theirs.name!r} has shape {_words(b)}, the student's {ours.name!r} {_words(a)}; "
            "allowed: the same; pass another teacher"
        )
    if b and isinstance(b[0], int) and not (a and a[0] == b[0]):
        raise ModelError(
            f"the teacher insists on batches of {b[0]}; allowed: any number; export it with a symbolic first dimension"
        )


def _words(shape: Sequence[object]) -> str:
    return "(" + ", ".join(str(d) for d in shape) + ")"
