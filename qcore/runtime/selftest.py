"""`python -m qcore.runtime.selftest SLOT`: does this model give the golden answers on this machine?

Run by the device's updater in its own process, before a release becomes active. It reads the slot's manifest as plain
JSON, checks the model's digest, loads it from bytes (so external data cannot be reached) with one thread, and compares
with golden.npz, within the tolerance of the first of the manifest's providers that works here. One JSON line on stdout;
exit 0 good, 1 a bad model, 2 it could not be tried here.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GOOD, BAD, UNABLE = 0, 1, 2


class _Unable(Exception):  # noqa: N818 - says nothing about the model
    """The test cannot run here."""


class _Bad(Exception):  # noqa: N818 - a verdict, not a fault of the program
    """The model does not do what its manifest says."""


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code after one JSON line was written."""
    args = sys.argv[1:] if argv is None else argv
    try:
        if len(args) != 1:
            raise _Unable("usage: python -m qcore.runtime.selftest SLOT_FOLDER")
        answer, code = _selftest(Path(args[0])), GOOD
    except _Unable as e:
        answer, code = {"error": str(e)}, UNABLE
    except _Bad as e:
        answer, code = {"error": str(e)}, BAD
    except Exception as e:  # noqa: BLE001 - onnxruntime raises its own kinds for a model it cannot run
        answer, code = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}, BAD
    sys.stdout.write(json.dumps({"ok": code == GOOD, **answer}) + "\n")
    return code


def _selftest(slot: Path) -> dict[str, Any]:
    try:
        import numpy as np
        import onnxruntime as ort
    except ImportError as e:
        raise _Unable(f"{e}; install onnxruntime and numpy for the self-test's interpreter") from e
    try:
        manifest = json.loads((slot / "manifest.json").read_bytes())
        model = (slot / "model.onnx").read_bytes()
        golden = dict(np.load(slot / "golden.npz", allow_pickle=False))
    except OSError as e:
        raise _Unable(f"{e.filename}: {e.strerror}") from e
    compat, n = manifest["compat"], manifest["golden"]["n"]
    _check_runtime(compat["onnxruntime"], ort.__version__)
    stated = next(m["sha256"] for m in manifest["members"] if m["path"] == "model.onnx")
    if hashlib.sha256(model).hexdigest() != stated:
        raise _Bad(f"model.onnx is not the one of the manifest (sha256 {stated[:12]})")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    wanted = [p for p in compat["providers"] if p in ort.get_available_providers()]
    if not wanted:
        raise _Unable(f"none of the providers {compat['providers']} is here")
    session = ort.InferenceSession(model, options, providers=wanted)
    provider = next(p for p in session.get_providers() if p in wanted)  # one that cannot start gives way to the next
    tolerance = next(t for t in manifest["golden"]["tolerances"] if t["provider"] == provider)
    feeds = {k.removeprefix("input:"): v for k, v in golden.items() if k.startswith("input:")}
    expected = {k.removeprefix("output:"): v for k, v in golden.items() if k.startswith("output:")}
    if not expected:
        raise _Bad("golden.npz holds no expected outputs")
    found = dict(zip(expected, session.run(list(expected), feeds), strict=True))
    return {"provider": provider, **_compare(found, expected, {"n": n, **tolerance})}


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return error and agreement if both are within `limits`; arrays are (n, ...), arg-max of (n, classes)."""
    import numpy as np

    worst, agreement = 0.0, 1.0
    for name, want in expected.items():
        got = np.asarray(found[name])
        if got.shape != want.shape or len(want) != limits["n"]:
            raise _Bad(f"{name} has shape {got.shape}, golden is {want.shape} of n={limits['n']}")
        if not np.isfinite(got).all():
            raise _Bad(f"{name} holds values that are not finite")
        worst = max(worst, float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max()))
        if want.ndim == 2:
            agreement = min(agreement, float((got.argmax(-1) == want.argmax(-1)).mean()))
    if worst > limits["max_abs_error"] or agreement < limits["argmax_agreement"]:
        raise _Bad(
            f"golden samples: error {worst:.3g} (allowed {limits['max_abs_error']:.3g}), arg-max agreement "
            f"{agreement:.3f} (at least {limits['argmax_agreement']:.3f})"
        )
    return {"n": limits["n"], "max_abs_error": worst, "argmax_agreement": agreement}


def _check_runtime(allowed: Mapping[str, str], found: str) -> None:
    """Return if `found` is at least `minimum` and older than `below`, comparing their leading numbers."""

    def numbers(version: str) -> list[int]:
        parts = [int("".join(itertools.takewhile(str.isdigit, part)) or 0) for part in version.split(".")[:3]]
        return parts + [0] * (3 - len(parts))

    if numbers(found) < numbers(allowed["minimum"]):
        raise _Unable(f"onnxruntime {found} is older than {allowed['minimum']}, which this release needs; update it")
    if numbers(found) >= numbers(allowed["below"]):
        raise _Unable(f"onnxruntime {found} is not below {allowed['below']}, up to which this release is good")


if __name__ == "__main__":
    sys.exit(main())
