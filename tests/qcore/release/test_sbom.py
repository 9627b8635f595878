"""Model card and parts list: deterministic, true of the file, and of the official form."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator
from models import conv_net, save, write_data

from qcore import steps
from qcore.canonical import canonical_json
from qcore.errors import ModelError
from qcore.files import sha256_file
from qcore.graph.history import HISTORY_KEY
from qcore.release.facts import PackageFacts, model_facts
from qcore.release.package import Package, unpack_package
from qcore.release.sbom import render_sbom


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package]:
    """A folder with a float model, and the package of it after two compression runs."""
    folder = tmp_path_factory.mktemp("made")
    model, card = save(conv_net(), folder / "float.onnx"), write_data(folder, conv_net())
    card.write_text(card.read_text() + "classes: [cat, dog, eel, fox]\n")
    steps.compress(model=model, data=card, out=folder / "s.onnx", recipe="cluster16", target="x86-avx2")
    steps.compress(model=folder / "s.onnx", data=card, out=folder / "q.onnx", target="x86-avx2")
    return folder, package_of(folder, "p.qpkg")


def package_of(folder: Path, out: str) -> Package:
    return steps.package(
        model=folder / "q.onnx", data=folder / "tiny.yaml", out=folder / out, family="tiny", version="1.0", memory_mb=50
    )


@pytest.fixture(scope="module")
def slot(made: tuple[Path, Package]) -> Path:
    folder, package = made
    unpack_package(package.path, folder / "slot")
    return folder / "slot"


def official_error(sbom: object) -> object:
    validator = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6)
    return validator.validate_str(json.dumps(sbom))


def test_the_parts_list_is_valid_by_the_official_schema(slot: Path) -> None:
    sbom = json.loads((slot / "sbom.cdx.json").read_bytes())
    assert official_error(sbom) is None
    assert official_error({**sbom, "components": [{"type": "nonsense", "name": "x"}]}) is not None
    refs = [c["bom-ref"] for c in (sbom["metadata"]["component"], *sbom["metadata"]["tools"]["components"])]
    refs += [c["bom-ref"] for c in sbom["components"]]
    assert len(set(refs)) == len(refs)
    assert {r for d in sbom["dependencies"] for r in (d["ref"], *d["dependsOn"])} <= set(refs)


def test_the_parts_list_names_the_model_its_ancestors_data_and_tools(made: tuple[Path, Package], slot: Path) -> None:
    folder, package = made
    sbom = json.loads((slot / "sbom.cdx.json").read_bytes())
    model = sbom["metadata"]["component"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": package.manifest.model_sha256}]
    ancestors = [a["hashes"][0]["content"] for a in model["pedigree"]["ancestors"]]
    assert ancestors == [sha256_file(folder / "float.onnx"), sha256_file(folder / "s.onnx")]
    assert package.manifest.provenance is not None
    data = {c["name"]: c["hashes"][0]["content"] for c in sbom["components"]}
    assert data["evaluation samples"] == package.manifest.provenance.data_sha256
    assert set(data) == {"evaluation samples", "calibration samples"}
    tools = {t["name"]: t["version"] for t in sbom["metadata"]["tools"]["components"]}
    assert tools["onnx"] == onnx.__version__
    assert {"kfp-qcore", "numpy", "onnx-ir", "onnxruntime", "zstandard", "python"} < set(tools)
    assert "timestamp" not in sbom["metadata"]


def test_the_card_says_from_what_how_and_on_which_data(made: tuple[Path, Package], slot: Path) -> None:
    folder, package = made
    text = (slot / "card.md").read_text()
    assert text.startswith("# tiny 1.0\n")
    assert package.manifest.provenance is not None
    for fact in (
        package.manifest.model_sha256,
        sha256_file(folder / "float.onnx"),
        "recipe `cluster16`",
        "recipe `int8` for x86-avx2",
        "fold-batchnorm, gemm-head, quantize",
        package.manifest.provenance.data_sha256,
        "* CPU features: avx2",
        "| CPUExecutionProvider |",
        "52428800 bytes",
    ):
        assert fact in text, fact
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    x0 = np.zeros((1, 3, 8, 8), np.float32)
    scope = {"onnxruntime": onnxruntime, "model": (slot / "model.onnx").read_bytes(), "x0": x0}
    exec(code, scope)  # noqa: S102 - our own card
    assert np.shape(scope["answers"]) == (1, 1, 4)
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert json.loads((slot / "labels.json").read_bytes()) == ["cat", "dog", "eel", "fox"]


def test_the_same_inputs_give_the_same_package(made: tuple[Path, Package]) -> None:
    folder, package = made
    assert package_of(folder, "again.qpkg").sha256 == package.sha256


def test_a_file_that_qcore_did_not_make_says_so(tmp_path: Path) -> None:
    model, card = save(conv_net(), tmp_path / "float.onnx"), write_data(tmp_path, conv_net())
    built = steps.package(
        model=model, data=card, out=tmp_path / "p.qpkg", family="tiny", version="1", target="x86-avx2"
    )
    unpack_package(built.path, tmp_path / "slot")
    text = (tmp_path / "slot" / "card.md").read_text()
    assert "does not say how it was made" in text
    assert "Its origin is not recorded" in text
    assert "not measured" in text
    sbom = json.loads((tmp_path / "slot" / "sbom.cdx.json").read_bytes())
    assert official_error(sbom) is None
    assert "pedigree" not in sbom["metadata"]["component"]
    assert not (tmp_path / "slot" / "labels.json").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '[{"made_from":"x"}]', "[" * 100_000, '[["a"]]'],
)
def test_a_history_that_is_something_else_is_one_line(tmp_path: Path, text: str) -> None:
    proto = conv_net()
    proto.metadata_props.add(key=HISTORY_KEY, value=text)
    with pytest.raises(ModelError, match=r"qcore\.history is not what qcore writes") as e:
        model_facts(proto.SerializeToString())
    assert "\n" not in str(e.value)


def test_a_history_cannot_write_into_the_card(made: tuple[Path, Package]) -> None:
    folder, _ = made
    proto = onnx.load(folder / "q.onnx")
    entry = next(p for p in proto.metadata_props if p.key == HISTORY_KEY)
    entry.value = entry.value.replace("cluster16", "x\\n# Approved by everybody")
    with pytest.raises(ModelError, match="not one line of text"):
        model_facts(proto.SerializeToString())


def test_another_model_has_another_serial_number(made: tuple[Path, Package]) -> None:
    folder, package = made
    digest, history = model_facts((folder / "q.onnx").read_bytes())
    m = package.manifest
    facts = PackageFacts(
        family=m.family,
        version=m.version,
        model_sha256=digest,
        model_bytes=1,
        history=history,
        data_sha256="0" * 64,
        task="classification",
        compat=m.compat,
        golden=m.golden,
        inputs=m.inputs,
        outputs=m.outputs,
        tools=(),
    )
    serials = {
        render_sbom(dataclasses.replace(facts, model_sha256=d))["serialNumber"] for d in (digest, digest, "1" * 64)
    }
    assert len(serials) == 2
    assert canonical_json(render_sbom(facts)) == canonical_json(render_sbom(facts))
