"""Every real model in the bench folder against ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from qcore.graph.io import load_model  # noqa: E402
from qcore.training.executor import build_executor  # noqa: E402


@pytest.mark.slow
def test_outputs_agree_with_onnxruntime(bench: Path) -> None:
    differences = {}
    for path in sorted((bench / "models").glob("*.onnx")):
        model = load_model(path)
        source = model.graph.inputs[0]
        shape = [int(side) for side in list(source.shape or [])[1:]]
        x = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
        expected = ort.InferenceSession(path).run(None, {str(source.name): x})[0]
        with torch.no_grad():
            got = next(iter(build_executor(model).eval()({str(source.name): torch.from_numpy(x)}).values())).numpy()
        differences[path.stem] = float(np.abs(got - expected).max() / np.abs(expected).max())
        assert (got.argmax(1) == expected.argmax(1)).all(), path.stem
    assert max(differences.values()) < 1e-4, differences  # float32 sums in another order
    assert len(differences) >= 6
