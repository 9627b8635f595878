"""Every component called as a function with real artifacts, in the pipeline's order; and what all have in common."""

import ast
import inspect
import json
import math
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from qcore import components, demo
from qcore.components import (
    calibrate,
    cosign,
    evaluate,
    gate,
    package,
    parity,
    prune,
    publish,
    quantize,
    refresh_repository,
    review,
)
from qcore.components.images import IMAGE
from qcore.demo.make_data import write_digits
from qcore.derived import cost_metrics
from qcore.errors import DataError, GateRefused, ModelError
from qcore.files import sha256_file
from qcore.release.evidence import verify_evidence
from qcore.release.keys import create_keys, load_keys
from qcore.release.repository import init_repository
from qcore.release.store import DirectoryStore
from qcore.report_file import report_from_json
from qcore.steps import make_owner_key, waive
from qcore.tracking.journal import End, Line, Metrics, Params, Start, Tags, journals, read_journal

COMPONENTS = (
    prune,
    calibrate,
    quantize,
    evaluate,
    package,
    gate,
    review,
    cosign,
    publish,
)
"""The chain."""

ALL = tuple(getattr(components, name) for name in components.__all__)
POLICY = "name: test\ntop1: {max_drop: 0.05}\n"
MODEL = Path(demo.__file__).parent / "digits_cnn.onnx"


@dataclass(frozen=True, kw_only=True)
class World:
    """The folder of the chain, its artifacts by name, the gate's string, and the tasks' journals."""

    folder: Path
    artifacts: dict[str, dsl.Artifact]
    outcome: str
    journals: dict[str, list[Line]]

    def path(self, name: str) -> Path:
        return Path(self.artifacts[name].path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("chain")
    keys = create_keys(folder / "keys", ["stable"])
    init_repository(DirectoryStore(folder=folder / "repository"), keys, ["stable"], now=datetime.now(UTC))
    made: dict[str, dsl.Artifact] = {
        "model": dsl.Model(name="model", uri=str(MODEL)),
        "data": dsl.Dataset(name="data", uri=str(write_digits(folder / "data"))),
    }

    def out(name: str, kind: type[dsl.Artifact] = dsl.Artifact) -> dsl.Artifact:
        made[name] = kind(name=name, uri=str(folder / name))
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("QCORE_JOURNAL_DIR", str(folder / "journal"))
        model, data = made["model"], made["data"]
        prune.python_func(
            model=model,
            pruned=out("pruned", dsl.Model),
            summary=out("pruning"),
            sparsity=0.0,
            model_sha256=sha256_file(MODEL),
        )
        calibrate.python_func(model=made["pruned"], data=data, table=out("table"))
        quantize.python_func(
            model=made["pruned"],
            table=made["table"],
            quantized=out("quantized", dsl.Model),
            summary=out("quantization"),
        )
        evaluate.python_func(
            candidate=made["quantized"],
            baseline=model,
            data=data,
            report=out("report"),
            metrics=out("metrics", dsl.Metrics),
            confusion=out("confusion", dsl.ClassificationMetrics),
        )
        package.python_func(
            model=made["quantized"], data=data, package=out("package"), family="digits", version="1.0.0"
        )
        outcome = gate.python_func(
            report=made["report"],
            package=made["package"],
            evidence=out("evidence"),
            decision_markdown=out("markdown", dsl.Markdown),
            decision_html=out("html", dsl.HTML),
            key=str(folder / "keys" / "gate.pem"),
            policy=POLICY,
        )
        review.python_func(
            report=made["report"],
            page=out("page", dsl.HTML),
            text=out("text", dsl.Markdown),
            facts=out("facts"),
            evidence=made["evidence"],
            summary=made["quantization"],
            candidate=made["quantized"],
            table=made["table"],
            package=made["package"],
            data=data,
            name="int8",
        )
        cosign.python_func(
            package=made["package"],
            evidence=made["evidence"],
            cosigned=out("cosigned"),
            repository=str(folder / "repository"),
            keys=str(folder / "keys"),
        )
        publish.python_func(
            package=made["package"],
            evidence=made["evidence"],
            cosigned=made["cosigned"],
            release=out("release"),
            repository=str(folder / "repository"),
            keys=str(folder / "keys"),
        )
    by_task: dict[str, list[Line]] = {}
    for path in journals(folder / "journal"):
        lines = read_journal(path)
        assert isinstance(lines[0], Start)
        by_task[str(lines[0].task)] = lines
    return World(folder=folder, artifacts=made, outcome=outcome, journals=by_task)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("pruned", "onnx"),
        ("table", "qcore-calibration"),
        ("quantized", "onnx"),
        ("report", "qcore-evaluation"),
        ("evidence", "qcore-evidence"),
        ("facts", "qcore-review"),
        ("package", "qpkg"),
        ("cosigned", "qcore-cosigned-role"),
        ("release", "qcore-release"),
    ],
)
def test_an_output_says_what_it_is(world: World, name: str, form: str) -> None:
    path = world.path(name)
    expected = {"format": form, "sha256": sha256_file(path), "size_bytes": path.stat().st_size}
    assert world.artifacts[name].metadata == expected


def test_the_command_makes_the_same_package(world: World, tmp_path: Path) -> None:
    options = {"--model": world.path("quantized"), "--data": world.path("data"), "--out": tmp_path / "p.qpkg"}
    named = ["--family", "digits", "--version", "1.0.0", "--target", "x86-avx2", "--json"]
    command = [sys.executable, "-m", "qcore", "package", *(str(x) for pair in options.items() for x in pair), *named]
    said = json.loads(subprocess.check_output(command, text=True))
    assert (tmp_path / "p.qpkg").read_bytes() == world.path("package").read_bytes()
    assert said["file_bytes"] == world.path("quantized").stat().st_size
    assert said["download_bytes"] == world.path("package").stat().st_size
    assert said["flash_bytes"] > said["file_bytes"]


def test_no_private_key_is_in_artifacts_journals_or_the_repository(world: World) -> None:
    """Everything that a run leaves behind, searched for every key as it lies in its file."""
    keys = sorted((world.folder / "keys").glob("*.pem"))
    secrets = [line for key in keys for line in key.read_bytes().splitlines() if not line.startswith(b"-----")]
    files = [p for p in world.folder.rglob("*") if p.is_file() and p.parent.name not in ("keys", "other keys")]
    assert len(keys) >= 5
    assert secrets
    assert {"journal", "repository"} < {p.relative_to(world.folder).parts[0] for p in files}
    leaking = [str(p) for p in files if any(s in p.read_bytes() for s in [*secrets, b"PRIVATE KEY"])]
    assert leaking == []


def test_metrics_are_the_reports_numbers(world: World) -> None:
    report = report_from_json(json.loads(world.path("report").read_bytes()))
    metrics = world.artifacts["metrics"].metadata
    assert all(isinstance(v, float) and math.isfinite(v) for v in metrics.values())
    assert metrics == {**report.metrics, **cost_metrics(report), "n": report.n}
    assert {"latency_ratio_high", "latency_all_cores_p50_ms", "cold_start_p50_ms", "package_bytes"} <= set(metrics)


def test_the_confusion_matrix_counts_every_sample(world: World) -> None:
    report = report_from_json(json.loads(world.path("report").read_bytes()))
    matrix = world.artifacts["confusion"].metadata["confusionMatrix"]
    rows = [row["row"] for row in matrix["rows"]]
    assert len(rows) == len(matrix["annotationSpecs"]) == 10
    assert sum(map(sum, rows)) == report.n
    assert sum(rows[k][k] for k in range(10)) == round(report.metrics["top1"] * report.n)


def test_the_review_tells_what_the_chain_made(world: World) -> None:
    facts = json.loads(world.path("facts").read_bytes())
    (candidate,) = facts["candidates"]
    assert facts["outcome"] == world.outcome
    assert candidate["digests"]["candidate"] == sha256_file(world.path("quantized"))
    assert candidate["summary"]["recipe"] == "int8"
    assert candidate["ranges"]["fits"]
    assert facts["verdict"] in world.path("page").read_text()
    notes = [
        x.values["mlflow.note.content"] for x in world.journals["review"] if isinstance(x, Tags) and x.on == "parent"
    ]
    assert notes == [world.path("text").read_text()]


def test_two_candidates_are_reviewed_side_by_side(world: World, tmp_path: Path) -> None:
    outputs = {name: dsl.Artifact(name=name, uri=str(tmp_path / name)) for name in ("page", "text", "facts")}
    report = world.artifacts["report"]
    review.python_func(report=report, other_report=report, name="ptq", other_name="qat", **outputs)
    facts = json.loads((tmp_path / "facts").read_bytes())
    assert [c["name"] for c in facts["candidates"]] == ["ptq", "qat"]
    assert facts["outcome"] == "not judged"
    with pytest.raises(DataError, match="name of its own"):
        review.python_func(report=report, other_report=report, name="x", other_name="x", **outputs)


def test_the_gate_returns_the_outcome_that_it_signed(world: World) -> None:
    key = create_keys(world.folder / "other keys", ["stable"]).signer("gate").public_key
    evidence = world.path("evidence").read_bytes()
    with pytest.raises(GateRefused):
        verify_evidence(evidence, [key])
    decision = verify_evidence(evidence, [load_keys(world.folder / "keys").signer("gate").public_key])
    assert world.outcome == decision.outcome == "pass"
    assert decision.model_sha256 == world.artifacts["quantized"].metadata["sha256"]
    assert world.path("markdown").read_text().startswith("**PASS")
    assert "PASS" in world.path("html").read_text()


def test_what_was_published_is_what_was_packaged(world: World) -> None:
    release = json.loads(world.path("release").read_bytes())
    assert release["sha256"] == world.artifacts["package"].metadata["sha256"]
    assert (release["family"], release["version"], release["channel"]) == ("digits", "1.0.0", "stable")


def test_every_task_was_tracked(world: World) -> None:
    assert list(world.journals) == [c.name for c in COMPONENTS]
    for lines in world.journals.values():
        last = lines[-1]
        assert isinstance(last, End)
        assert last.status == "FINISHED"


def test_the_parent_run_has_what_a_reviewer_compares(world: World) -> None:
    lines = [line for task in world.journals.values() for line in task]
    params, metrics, tags = (
        {k for x in lines if isinstance(x, kind) and x.on == "parent" for k in x.values}
        for kind in (Params, Metrics, Tags)
    )
    assert params >= {"recipe", "target", "sparsity", "calibration_samples", "evaluation_samples", "policy_sha256"}
    assert metrics >= {"top1", "baseline_top1", "top1_delta", "top1_delta_lower", "agreement", "package_bytes"}
    assert metrics >= {"size_bytes", "size_ratio", "latency_p50_ms", "baseline_latency_p50_ms"}
    assert tags >= {"qcore.gate", "qcore.release", "qcore.channel", "model.sha256", "mlflow.note.content"}


def test_no_number_is_tracked_twice(world: World) -> None:
    for lines in world.journals.values():
        seen = [(x.on, k, x.step) for x in lines if isinstance(x, Metrics) for k in x.values]
        assert len(seen) == len(set(seen))


def test_another_model_than_the_one_named_is_refused(world: World, tmp_path: Path) -> None:
    pruned = dsl.Model(name="pruned", uri=str(tmp_path / "pruned"))
    summary = dsl.Artifact(name="summary", uri=str(tmp_path / "summary"))
    with pytest.raises(ModelError, match="expected"):
        prune.python_func(model=world.artifacts["model"], pruned=pruned, summary=summary, model_sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_champion_and_parity_reach_the_gate(world: World, tmp_path: Path) -> None:
    def out(name: str, kind: type[dsl.Artifact] = dsl.Artifact) -> dsl.Artifact:
        return kind(name=name, uri=str(tmp_path / name))

    candidate, data = world.artifacts["quantized"], world.artifacts["data"]
    measured, elsewhere = out("report"), out("parity")
    named = {"candidate": candidate, "baseline": world.artifacts["model"], "data": data}
    named["confusion"] = out("confusion", dsl.ClassificationMetrics)
    metrics = out("metrics", dsl.Metrics)
    evaluate.python_func(**named, report=measured, metrics=metrics, champion=str(MODEL))
    assert metrics.metadata["champion_top1"] == metrics.metadata["baseline_top1"]
    parity.python_func(model=candidate, data=data, report=elsewhere, metrics=out("m", dsl.Metrics), samples=8)
    assert elsewhere.metadata["format"] == "qcore-parity"
    policy = "top1: {max_drop: 0.05, max_drop_champion: 0.05}\nparity: {sqnr_db: 0}\n"
    pages = {"decision_markdown": out("md", dsl.Markdown), "decision_html": out("html", dsl.HTML)}
    fixed = {
        "evidence": out("e"),
        "package": world.artifacts["package"],
        **pages,
        "key": str(world.folder / "keys" / "gate.pem"),
        "policy": policy,
    }
    assert gate.python_func(report=measured, parity=elsewhere, **fixed) == "pass"
    assert gate.python_func(report=measured, **fixed) == "fail"
    assert gate.python_func(report=world.artifacts["report"], parity=elsewhere, **fixed) == "fail"
    with pytest.raises(ModelError, match=r"champion .* does not exist"):
        evaluate.python_func(**named, report=out("r"), metrics=metrics, champion=str(tmp_path / "none.onnx"))
    with pytest.raises(ModelError, match="expected 000"):
        evaluate.python_func(**named, report=out("r"), metrics=metrics, champion=str(MODEL), champion_sha256="0" * 64)


def test_a_failed_gate_cannot_be_published(world: World, tmp_path: Path) -> None:
    evidence = dsl.Artifact(name="evidence", uri=str(tmp_path / "evidence"))
    outcome = gate.python_func(
        report=world.artifacts["report"],
        package=world.artifacts["package"],
        evidence=evidence,
        decision_markdown=dsl.Markdown(name="m", uri=str(tmp_path / "m")),
        decision_html=dsl.HTML(name="h", uri=str(tmp_path / "h")),
        key=str(world.folder / "keys" / "gate.pem"),
        policy="top1: {min: 0.9999}\n",
    )
    assert outcome == "fail"
    with pytest.raises(GateRefused, match="gate outcome is fail"):
        publish.python_func(
            package=world.artifacts["package"],
            evidence=evidence,
            release=dsl.Artifact(name="release", uri=str(tmp_path / "release")),
            repository=str(world.folder / "repository"),
            keys=str(world.folder / "keys"),
        )
    assert not (tmp_path / "release").exists()


def test_a_repository_is_refreshed_when_something_is_due(world: World) -> None:
    place = {"repository": str(world.folder / "repository"), "keys": str(world.folder / "keys")}
    assert refresh_repository.python_func(**place) == ""


def test_a_waiver_reaches_the_gate_as_text(world: World, tmp_path: Path) -> None:
    key = make_owner_key(out=tmp_path / "ada.pem")
    owners = f"waivers: {{owners: [{{name: Ada, key: {key}}}], checks: [size_ratio], max_days: 3}}\n"

    def decide(name: str, waiver: str) -> str:
        outcome: str = gate.python_func(
            report=world.artifacts["report"],
            package=world.artifacts["package"],
            evidence=dsl.Artifact(name="evidence", uri=str(tmp_path / name)),
            decision_markdown=dsl.Markdown(name="m", uri=str(tmp_path / "m")),
            decision_html=dsl.HTML(name="h", uri=str(tmp_path / "h")),
            key=str(world.folder / "keys" / "gate.pem"),
            policy=f"{POLICY}budgets: {{size_ratio: 0.01}}\n{owners}",
            waiver=waiver,
        )
        return outcome

    assert decide("failed", "") == "fail"
    signed = {"evidence": tmp_path / "failed", "key": tmp_path / "ada.pem", "out": tmp_path / "w"}
    waive(**signed, checks=["size_ratio"], owner="Ada", reason="launch", days=3)
    assert decide("waived", (tmp_path / "w").read_text()) == "pass"
    assert (tmp_path / "m").read_text().startswith("**PASS BY WAIVER")


@pytest.mark.parametrize("component", ALL, ids=lambda c: c.name)
def test_the_rules_of_a_component(component: Any) -> None:
    source = textwrap.dedent(inspect.getsource(component.python_func))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:]  # without the docstring
    assert sum((s.end_lineno or s.lineno) - s.lineno + 1 for s in body) <= 25
    imported = {
        (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
        for n in ast.walk(function)
        if isinstance(n, ast.ImportFrom | ast.Import)
    }
    assert imported <= {"qcore", "pathlib"}
    assert not any(isinstance(n, ast.For | ast.While | ast.Try | ast.If) for n in ast.walk(function))

    spec = component.component_spec
    assert spec.description
    assert all(i.description for i in spec.inputs.values())
    # kfp.local makes an int of every whole number, and of None an error that no caller can avoid.
    assert not [n for n, i in spec.inputs.items() if i.type == "Integer" and i.optional and i.default is None]
    container = spec.implementation.container
    assert container.image == IMAGE
    assert "pip install" not in " ".join(container.command)
    assert "__future__" not in Path(inspect.getfile(component.python_func)).read_text()


def test_the_gate_has_one_string_output() -> None:
    outputs = gate.component_spec.outputs
    assert {name: o.type for name, o in outputs.items() if "@" not in o.type} == {"Output": "String"}
