import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from qcore.errors import ModelError
from qcore.measured import Latency, MeasuredModel
from qcore.release.waivers import new_waiver, overridden, owner_key, sign_waiver
from qcore.report import Check, EvaluationReport, GateDecision, MeasuredData, Outcome, PairedCounts, Samples
from qcore.review.facts import review
from qcore.review.markdown import to_markdown
from qcore.review.page import to_html
from qcore.review.source import one_candidate
from qcore.tracking.facts import expect_model, text_file
from qcore.tracking.journal import Attachment, Metrics, Tags, journals, read_journal
from qcore.tracking.tracker import Tracker
from qcore.tracking.verdict import VerdictFiles, summary_metrics, track_decision
from qcore.waiver import Override, Owner


def report(labels: bool = True) -> EvaluationReport:
    metrics = {"agreement": 0.75, "output_sqnr_db": 30.0}
    if labels:
        metrics |= {"top1": 0.75, "baseline_top1": 1.0, "top1_delta": -0.25}
    return EvaluationReport(
        model=MeasuredModel(sha256="a" * 64, size_bytes=1000, latency_ms=Latency(p50=0.5, p95=0.7, runs=9)),
        baseline=MeasuredModel(sha256="b" * 64, size_bytes=4000, latency_ms=Latency(p50=1.0, p95=1.5, runs=9)),
        data=MeasuredData(
            name="dig|its", split="evaluation", task="classification" if labels else "none", sha256="c" * 64
        ),
        n=4,
        metrics=metrics,
        paired=PairedCounts(both_right=3, only_candidate_right=0, only_baseline_right=1, both_wrong=0)
        if labels
        else None,
        samples=Samples(
            index=(0, 1, 2, 3), label=(0, 1, 2, 3) if labels else None, baseline=(0, 1, 2, 3), candidate=(0, 1, 2, 0)
        ),
        runtime={"onnxruntime": "1.27"},
        qcore_version="0.1.0",
        measured_at="2026-11-27T12:00:00Z",
    )


def decision(outcome: Outcome) -> GateDecision:
    check = Check(
        name="top1_drop",
        outcome=outcome,
        observed=-0.25,
        bound=-0.6,
        limit=-0.7 if outcome == "pass" else -0.01,
        reason="1 lost <script> of 4",
    )
    return GateDecision(
        outcome=outcome,
        checks=(check,),
        confidence=0.95,
        n=4,
        model_sha256="a" * 64,
        baseline_sha256="b" * 64,
        data_sha256="c" * 64,
        policy_sha256="d" * 64,
        report_sha256=report().sha256,
        qcore_version="0.1.0",
    )


def test_a_reader_learns_who_may_override_and_who_did() -> None:
    shown = to_markdown(review(one_candidate(report(), decision("pass"))))
    assert "Nobody may override: the policy allows no waivers." in shown
    key = CryptoSigner.generate_ed25519()
    ada = Owner(name="Ada <b>", key=owner_key(key.public_key))
    rules = Override(owners=(ada,), checks=("top1_drop",), max_days=3)
    failed = replace(decision("fail"), override=rules)
    assert "may waive top1_drop" in to_markdown(review(one_candidate(report(), failed)))
    when = datetime(2026, 11, 3, tzinfo=UTC)
    waiver = sign_waiver(new_waiver(failed, ["top1_drop"], ada, "a | launch", (when, timedelta(days=2))), key)
    content = review(one_candidate(report(), overridden(failed, [waiver], when)))
    text = to_markdown(content)
    assert text.startswith("**PASS BY WAIVER of Ada &lt;b&gt;: ")
    assert "| pass by waiver |" in text
    assert "| top1_drop | a \\| launch | 2026-11-03T00:00:00Z | 2026-11-05T00:00:00Z |" in text
    assert "<b>" not in to_html(content)


def test_without_labels_there_is_no_accuracy() -> None:
    assert "top1" not in summary_metrics(report(labels=False), decision("fail"))


def test_summary_numbers() -> None:
    assert summary_metrics(report(), decision("fail")) == {
        "top1": 0.75,
        "baseline_top1": 1.0,
        "top1_delta": -0.25,
        "top1_delta_lower": -0.6,
        "agreement": 0.75,
        "size_bytes": 1000.0,
        "size_ratio": 0.25,
        "latency_p50_ms": 0.5,
        "baseline_latency_p50_ms": 1.0,
    }


def test_the_parent_run_gets_what_a_reviewer_needs(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(json.dumps(report().to_json()))
    (tmp_path / "evidence").write_text("{}")
    files = VerdictFiles(
        report=tmp_path / "report", evidence=tmp_path / "evidence", markdown=tmp_path / "m", html=tmp_path / "h"
    )
    with Tracker("gate", env={"QCORE_JOURNAL_DIR": str(tmp_path / "journal")}) as t:
        track_decision(t, decision("fail"), files)
    lines = read_journal(journals(tmp_path / "journal")[0])
    tags = {k: v for x in lines if isinstance(x, Tags) and x.on == "parent" for k, v in x.values.items()}
    assert tags["qcore.gate"] == "fail"
    assert tags["model.sha256"] == "a" * 64
    assert tags["mlflow.note.content"] == (tmp_path / "m").read_text()
    assert {f"{x.folder}/{x.name}" for x in lines if isinstance(x, Attachment) and x.on == "parent"} == {
        "report/report.json",
        "report/report.html",
        "report/gate.md",
        "report/evidence.json",
    }
    assert any(isinstance(x, Metrics) and x.on == "parent" and x.values["top1_delta"] == -0.25 for x in lines)


def test_another_model_than_the_one_named_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")
    expect_model(path, "")
    with pytest.raises(ModelError, match="expected " + "0" * 64):
        expect_model(path, "0" * 64)


def test_a_text_becomes_a_file_and_no_text_no_file() -> None:
    with text_file("name: x\n", "policy.yaml") as path:
        assert path is not None
        assert path.name == "policy.yaml"
        assert path.read_text() == "name: x\n"
    assert not path.exists()
    with text_file(" \n", "policy.yaml") as path:
        assert path is None
