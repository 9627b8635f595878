"""One evidence file checked offline: genuine or not, about these files or not, and the decision derived again."""

import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import conv_net, save, write_data

from qcore import steps
from qcore.errors import GateRefused, QcoreError, ReleaseError
from qcore.release.evidence import sign_decision, verify_evidence
from qcore.release.keys import create_keys, load_public_key, load_signer
from qcore.release.repository import init_repository
from qcore.release.store import DirectoryStore

SMALL = "budgets: {size_ratio: 0.0001}\n"
POLICY = f"agreement: {{min: 0.5}}\nmax_age_days: 30\nparity: {{sqnr_db: -100}}\n{SMALL}"


def with_owner(text: str, key: str, checks: str = "size_ratio") -> str:
    return f"{text}waivers: {{owners: [{{name: Ada Example, key: {key}}}], checks: [{checks}], max_days: 14}}\n"


class Judged:
    """A candidate that misses its budget of size: its files, and evidence of a fail and of a pass by waiver."""

    def __init__(self, folder):
        proto = conv_net()
        (folder / "data").mkdir()
        self.folder, self.baseline = folder, save(proto, folder / "float.onnx")
        self.data, self.keys = write_data(folder / "data", proto), create_keys(folder / "keys", ["stable"])
        self.model, self.report, self.policy = folder / "q.onnx", folder / "r.json", folder / "policy.yaml"
        self.package, self.gate_key = folder / "x.qpkg", folder / "keys" / "gate.pem"
        self.policy.write_text(with_owner(POLICY, steps.make_owner_key(out=folder / "ada.pem")))
        steps.compress(model=self.baseline, data=self.data, out=self.model, target="x86-avx2")
        steps.evaluate(candidate=self.model, baseline=self.baseline, data=self.data, out=self.report)
        self.parity = folder / "parity.json"
        steps.parity(model=self.model, data=self.data, out=self.parity, samples=4)
        steps.package(model=self.model, data=self.data, out=self.package, family="tiny", version="1.0")
        self.failed, self.waiver, self.waived = (folder / f"{n}.json" for n in ("failed", "waiver", "waived"))
        self.decide(self.failed)
        self.waive(self.waiver)
        self.decide(self.waived, waivers=[self.waiver])

    def decide(self, out, **more):
        gate = {"report": self.report, "policy": self.policy, "package": self.package, "key": self.gate_key}
        gate["parity"] = self.parity
        return steps.gate(**{**gate, **more}, out=out)

    def waive(self, out, **more):
        asked = {"evidence": self.failed, "checks": ["size_ratio"], "owner": "Ada Example", "reason": "a big launch"}
        return steps.waive(**{**asked, "days": 10, "key": self.folder / "ada.pem", **more}, out=out)

    @property
    def files(self):
        """Everything that can be held against the evidence."""
        given = {"package": self.package, "model": self.model, "data": self.data}
        return {**given, "policy": self.policy, "report": self.report, "parity": self.parity}

    def verify(self, evidence=None, **files):
        return steps.verify_gate(evidence=evidence or self.failed, key=self.folder / "keys" / "gate.pub", **files)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return Judged(tmp_path_factory.mktemp("judged"))


def states(found):
    return {f.what: f.state for f in found.findings}


def test_genuine_evidence_of_a_fail_is_said_to_be_both(judged):
    found = judged.verify(**judged.files)
    assert set(states(found).values()) == {"fits"}
    assert (found.genuine, found.releasable) == (True, False)
    assert found.decision.outcome == "fail"
    assert states(found)["decided again"] == "fits"
    assert "Ada Example may waive size_ratio" in found.to_json()["who_may_override"]


def test_what_was_not_given_is_said_to_be_not_checked(judged):
    found = judged.verify()
    told = states(found)
    assert found.genuine
    assert {what for what, state in told.items() if state == "not checked"} == {*judged.files, "decided again"}


def test_a_pass_by_waiver_holds_until_it_expires(judged):
    found = judged.verify(judged.waived, **judged.files)
    assert (found.genuine, found.releasable, found.decision.outcome) == (True, True, "pass")
    assert {c.name: c.outcome for c in found.decision.checks}["size_ratio"] == "fail"
    late = judged.verify(judged.waived, now=datetime.now(UTC) + timedelta(days=11))
    assert (late.genuine, late.releasable) == (True, False)
    assert "expired" in late.lapsed


def test_what_was_counted_is_said_in_words_and_a_missing_key_with_how_to_make_one(judged, tmp_path):
    said = {f.what: f.detail for f in judged.verify(judged.waived).findings}["decision"]
    assert said.endswith(" checks and 1 waiver say")
    plain = tmp_path / "plain.yaml"
    plain.write_text("agreement: {min: 0.5}\n")
    judged.decide(tmp_path / "one.json", policy=plain)
    said = {f.what: f.detail for f in judged.verify(tmp_path / "one.json").findings}["decision"]
    assert said == "pass, as its 1 check says"
    with pytest.raises(ReleaseError, match=r"`qcore repo init`.*`qcore repo new-key`"):
        judged.decide(tmp_path / "none.json", key=tmp_path / "none.pem")


def test_a_budget_of_the_package_is_about_its_file(judged, tmp_path):
    size, policy, out = judged.package.stat().st_size, tmp_path / "p.yaml", tmp_path / "e.json"
    for limit, outcome in ((size, "pass"), (size - 1, "fail")):
        policy.write_text(f"agreement: {{min: 0.5}}\nbudgets: {{package_bytes: {limit}}}\n")
        (check,) = [c for c in judged.decide(out, policy=policy).checks if c.name == "package_bytes"]
        assert (check.outcome, check.observed) == (outcome, size)
        known = {**judged.files, "policy": policy}
        assert states(judged.verify(out, **known))["decided again"] == "fits"
        del known["package"]
        assert states(judged.verify(out, **known))["decided again"] == "fits"


def test_no_other_file_fits(judged, tmp_path):
    other = Judged.__new__(Judged)
    other.__dict__.update(judged.__dict__, policy=tmp_path / "p.yaml", package=tmp_path / "y.qpkg")
    steps.package(model=judged.model, data=judged.data, out=other.package, family="tiny", version="1.1")
    other.policy.write_text(judged.policy.read_text().replace("14", "13"))
    steps.evaluate(candidate=judged.model, baseline=judged.baseline, data=judged.data, out=tmp_path / "r.json")
    wrong = {
        "package": other.package,
        "model": judged.baseline,
        "policy": other.policy,
        "report": tmp_path / "r.json",  # the same files, measured again: other latencies
    }
    for what, path in wrong.items():
        found = judged.verify(**{what: path})
        assert states(found)[what] == "does not fit", what
        assert not found.genuine
    found = judged.verify(data=judged.data, split="calibration")
    assert (states(found)["data"], found.genuine) == ("does not fit", False)
    for what in judged.files:
        found = judged.verify(**{what: tmp_path / "absent"})
        assert (states(found)[what], found.genuine) == ("does not fit", False)


def test_a_gate_that_signs_what_the_report_does_not_say_is_found_out(judged, tmp_path):
    signer = load_signer(judged.gate_key)
    honest = verify_evidence(judged.failed.read_bytes(), [signer.public_key])
    bought = tuple(
        replace(c, outcome="pass", observed=c.limit, bound=c.limit) if c.outcome == "fail" else c for c in honest.checks
    )
    (tmp_path / "e.json").write_bytes(sign_decision(replace(honest, checks=bought, outcome="pass"), signer))
    alone = judged.verify(tmp_path / "e.json")
    assert alone.releasable  # the gate's word, and nothing to hold against it
    found = judged.verify(tmp_path / "e.json", report=judged.report, policy=judged.policy, parity=judged.parity)
    assert (states(found)["decided again"], found.genuine) == ("does not fit", False)


def test_the_default_policy_is_known_without_a_file(judged, tmp_path):
    judged.decide(tmp_path / "e.json", policy=None)
    found = judged.verify(tmp_path / "e.json", report=judged.report, parity=judged.parity)
    assert states(found)["decided again"] == "fits"
    for missing in ("policy", "parity"):
        known = {name: judged.files[name] for name in ("report", "policy", "parity") if name != missing}
        unknown = {f.what: f for f in judged.verify(judged.failed, **known).findings}["decided again"]
        assert unknown.state == "not checked"
        assert f"no --{missing} given" in unknown.detail


def test_another_key_finds_nothing_to_believe(judged, tmp_path):
    create_keys(tmp_path / "keys", ["stable"])
    found = steps.verify_gate(evidence=judged.failed, key=tmp_path / "keys" / "gate.pub", **judged.files)
    assert (found.decision, found.genuine) == (None, False)
    assert states(found) == {"evidence": "does not fit"}
    with pytest.raises(ReleaseError, match="is not a public key"):
        steps.verify_gate(evidence=judged.failed, key=judged.policy)


def test_the_repository_says_whose_key_counts(judged, tmp_path):
    store = DirectoryStore(folder=tmp_path / "repo")
    init_repository(store, judged.keys, ["stable"], now=datetime.now(UTC))
    trusted = {"key": tmp_path / "repo", "root": judged.keys.pinned_root}
    with pytest.raises(ReleaseError, match="no gate key for family tiny"):
        steps.verify_gate(evidence=judged.failed, **trusted)
    steps.publish(package=judged.package, evidence=judged.waived, repository=tmp_path / "repo", keys=judged.keys.folder)
    assert steps.verify_gate(evidence=judged.waived, **trusted, **judged.files).releasable
    with pytest.raises(ReleaseError, match="pass --root"):
        steps.verify_gate(evidence=judged.failed, key=tmp_path / "repo")


def test_a_waiver_for_one_measurement_is_none_for_the_next(judged, tmp_path):
    steps.evaluate(candidate=judged.model, baseline=judged.baseline, data=judged.data, out=tmp_path / "r.json")
    with pytest.raises(GateRefused, match="is about report"):
        judged.decide(tmp_path / "e.json", report=tmp_path / "r.json", waivers=[judged.waiver])
    with pytest.raises(GateRefused, match="is about package"):
        judged.decide(tmp_path / "e.json", package=None, waivers=[judged.waiver])
    with pytest.raises(GateRefused, match="expired"):
        judged.decide(tmp_path / "e.json", waivers=[judged.waiver], now=datetime.now(UTC) + timedelta(days=10))
    assert not (tmp_path / "e.json").exists()


def test_a_waiver_that_the_policy_does_not_allow_is_not_written(judged, tmp_path):
    for more, says in (
        ({"days": 15}, "the policy allows 14"),
        ({"days": 0}, "allowed: 1 to 90"),
        ({"checks": ["agreement_min"]}, "passes and needs no waiver"),
        ({"owner": "Eve"}, "is foreign"),
        ({"key": judged.gate_key}, "is foreign"),
        ({"reason": "two\nlines"}, "one line"),
        ({"evidence": judged.folder / "absent.json"}, "run `qcore gate` first"),
    ):
        with pytest.raises(GateRefused, match=says) as e:
            judged.waive(tmp_path / "w.json", **more)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "w.json").exists()
    with pytest.raises(ReleaseError, match="is never overwritten"):
        steps.make_owner_key(out=judged.folder / "ada.pem")
    assert (judged.folder / "ada.pem").stat().st_mode & 0o777 == 0o600


def test_public_and_private_files_give_the_same_key(judged):
    assert load_public_key(judged.folder / "keys" / "gate.pub") == load_public_key(judged.gate_key)


FLIPPED = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def flipped(path, target, data):
    """Write `path` with one byte changed to `target`."""
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    target.write_bytes(content)
    return target


@FLIPPED
@given(st.data())
def test_a_package_with_any_byte_changed_is_not_the_one_that_was_gated(judged, tmp_path, data):
    found = judged.verify(judged.waived, package=flipped(judged.package, tmp_path / "bad.qpkg", data))
    assert (states(found)["package"], found.genuine) == ("does not fit", False)


@FLIPPED
@given(st.data())
def test_a_policy_with_any_byte_changed_means_the_same_or_does_not_fit(judged, tmp_path, data):
    from qcore.config import load_config
    from qcore.policy import GatePolicy

    bad = flipped(judged.policy, tmp_path / "bad.yaml", data)
    try:
        same = load_config(bad, GatePolicy, "gate policy") == load_config(judged.policy, GatePolicy, "gate policy")
    except QcoreError:
        same = False
    assert judged.verify(policy=bad).genuine == same


@FLIPPED
@given(st.data())
def test_evidence_with_any_byte_changed_says_nothing_or_the_same(judged, tmp_path, data):
    found = judged.verify(flipped(judged.waived, tmp_path / "bad.json", data))
    assert found.decision in (None, judged.verify(judged.waived).decision)
    assert found.genuine == (found.decision is not None)


def test_a_report_that_lacks_any_sample_or_metric_is_not_decided(judged, tmp_path):
    value = json.loads(judged.report.read_bytes())
    value["metrics"].pop(random.Random(0).choice(sorted(value["metrics"])))
    (tmp_path / "r.json").write_text(json.dumps(value))
    with pytest.raises(GateRefused):
        judged.decide(tmp_path / "e.json", report=tmp_path / "r.json", waivers=[judged.waiver])
    assert not (tmp_path / "e.json").exists()
