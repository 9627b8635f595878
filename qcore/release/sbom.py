"""The parts list in a package: CycloneDX 1.6 as JSON, with the model, what it was made from, and the tools.

Deterministic: the serial number is derived from the model, and there is no time. Source: CycloneDX 1.6 specification
(ECMA-424), `machine-learning-model` components with `modelCard` and `pedigree`;
`tests/qcore/release/test_sbom.py` holds it against the official JSON schema.
"""

import uuid

from qcore.canonical import Digest, Json
from qcore.release.facts import PackageFacts
from qcore.release.manifest import TensorInfo

NAMESPACE = uuid.UUID("0f0c4a4e-9c0b-5a3e-8f5e-0c4b7a1d2e3f")
"""Of the serial numbers: any constant does, as long as it never changes."""


def render_sbom(facts: PackageFacts) -> Json:
    """Return the parts list as a JSON value."""
    data = sorted({(use, digest) for making in facts.history for use, digest in making.data.items()})
    data.append(("evaluation", facts.data_sha256))
    datasets = [_data(use, digest) for use, digest in data]
    serial = uuid.uuid5(NAMESPACE, f"{facts.family} {facts.version} {facts.model_sha256}")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": t.name, "version": t.version, "bom-ref": f"tool:{t.name}"}
                    for t in facts.tools
                ]
            },
            "component": _model(facts, datasets),
        },
        "components": datasets,
        "dependencies": [
            {"ref": _ref("model", facts.model_sha256), "dependsOn": sorted({d["bom-ref"] for d in datasets})}
        ],
    }


def _model(facts: PackageFacts, datasets: list[Json]) -> Json:
    component = {
        "type": "machine-learning-model",
        "bom-ref": _ref("model", facts.model_sha256),
        "name": facts.family,
        "version": facts.version,
        "hashes": _hashes(facts.model_sha256),
        "modelCard": {
            "modelParameters": {
                "task": facts.task,
                "datasets": [{"ref": d["bom-ref"]} for d in datasets],
                "inputs": [{"format": _format(t)} for t in facts.inputs],
                "outputs": [{"format": _format(t)} for t in facts.outputs],
            }
        },
        "properties": [
            {"name": "qcore:size_bytes", "value": str(facts.model_bytes)},
            {"name": "qcore:opset", "value": str(facts.compat.opset)},
            {"name": "qcore:hardware", "value": ",".join(facts.compat.hardware)},
            {"name": "qcore:onnxruntime", "value": facts.compat.onnxruntime.tested},
        ],
    }
    if facts.history:
        component["pedigree"] = {
            "ancestors": [_ancestor(m.made_from) for m in facts.history],
            "notes": "; ".join(f"{m.recipe}: {', '.join(m.steps)} (qcore {m.qcore_version})" for m in facts.history),
        }
    return component


def _ancestor(digest: Digest) -> Json:
    return {"type": "machine-learning-model", "name": f"sha256:{digest}", "hashes": _hashes(digest)}


def _data(use: str, digest: Digest) -> Json:
    return {"type": "data", "bom-ref": _ref(use, digest), "name": f"{use} samples", "hashes": _hashes(digest)}


def _hashes(digest: Digest) -> Json:
    return [{"alg": "SHA-256", "content": digest}]


def _ref(kind: str, digest: Digest) -> str:
    return f"{kind}:{digest[:16]}"


def _format(tensor: TensorInfo) -> str:
    return f"{tensor.name}: {tensor.dtype}[{', '.join('?' if s is None else str(s) for s in tensor.shape)}]"
