"""What a reviewer sees in MLflow, in a browser: a release that passed, one that did not, and the model registry.

Needs chromium (`apt-get install chromium`); run it with `pytest -m browser tests/e2e/test_mlflow_pages.py`. Pictures of
the pages are left in `$QCORE_PICTURES`, where that is set.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import mlflow_server

from qcore import demo
from qcore.demo.make_data import write_digits
from qcore.pipelines.local import ReleaseArguments, ReleaseRun, run_release
from qcore.release.keys import create_keys
from qcore.release.repository import init_repository
from qcore.release.store import DirectoryStore

pytestmark = [pytest.mark.slow, pytest.mark.browser]
WAIT_MS = 60_000
# Without these a third of the page is an assistant and a dialogue lies over the registry.
SETTINGS = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "_mlflow_model_registry_promo_modal_dismissed_v1": "true",
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Two runs on one server, and a browser."""

    passed: ReleaseRun
    failed: ReleaseRun
    uri: str
    browser: Any

    def page(self, path: str, until: str) -> Any:
        """Return the page at `path` once it shows the text `until`."""
        page = self.browser.new_page()
        page.goto(f"{self.uri}/#{path}")
        page.get_by_text(until).first.wait_for(timeout=WAIT_MS)
        return page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed; apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": 1400, "height": 1500})
        items = ((json.dumps(k), json.dumps(v)) for k, v in SETTINGS.items())
        context.add_init_script("".join(f"localStorage.setItem({k}, {v});" for k, v in items))
        yield context
        browser.close()


@pytest.fixture(scope="module")
def seen(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("pages")
    keys = create_keys(folder / "keys", ["stable"])
    init_repository(DirectoryStore(folder=folder / "repository"), keys, ["stable"], now=datetime.now(UTC))
    (folder / "policy.yaml").write_text("name: digits\ntop1: {max_drop: 0.02}\n")
    good = ReleaseArguments(
        model=Path(demo.__file__).parent / "digits_cnn.onnx",
        data=write_digits(folder / "data"),
        family="digits",
        version="1.0.0",
        repository=folder / "repository",
        keys=folder / "keys",
        policy=folder / "policy.yaml",
        target="x86-vnni",
    )
    coarse = replace(good, recipe="int2-weights", version="1.0.1")
    (folder / "server").mkdir()
    with mlflow_server(folder / "server") as server:
        runs = [run_release(a, workspace=folder / "runs", tracking_uri=server.uri) for a in (good, coarse)]
        assert [r.tracking_problem for r in runs] == [None, None]
        yield Seen(passed=runs[0], failed=runs[1], uri=server.uri, browser=chromium)


def text_of(page: Any, name: str) -> str:
    """Return what the page says, on one line; with a picture of it where somebody wants one."""
    if place := os.environ.get("QCORE_PICTURES"):
        page.screenshot(path=str(Path(place) / f"{name}.png"))
    return re.sub(r"\s+", " ", str(page.inner_text("body"))).replace(" :", ":")


def run_page(seen: Seen, run: ReleaseRun, name: str) -> str:
    page = seen.page(f"/experiments/1/runs/{run.run_id}", "qcore.gate")
    page.get_by_text("Show more").first.click()
    return text_of(page, name)


def test_the_run_page_answers_a_reviewer(seen: Seen) -> None:
    said = run_page(seen, seen.passed, "passed")
    assert "PASS" in said
    assert "qcore.gate: pass" in said
    (check,) = seen.passed.decision.checks
    assert check.name in said
    assert check.reason in said
    for digest in (seen.passed.decision.model_sha256, seen.passed.decision.baseline_sha256):
        assert digest in said
    assert "digits/calibration" in said
    assert "Registered models digits v1" in said
    assert all(task in said for task in ("publish", "gate", "evaluate"))
    for word in ("package.sha256", "qcore.channel: stable", "top1_delta_lower", "package_bytes", "weight_bits"):
        assert word in said


def test_the_page_of_a_run_that_failed_says_so_first(seen: Seen) -> None:
    said = run_page(seen, seen.failed, "failed")
    assert "qcore.gate: fail" in said
    assert said.index("FAIL") < said.index("Metrics (")
    assert seen.failed.decision.checks[0].reason in said
    assert "PASS" not in said


def test_the_report_is_shown_where_it_lies(seen: Seen) -> None:
    path = f"/experiments/1/runs/{seen.passed.run_id}/artifacts/report/report.html"
    page = seen.page(path, "report.html")
    frame = page.frame_locator("iframe").first
    frame.get_by_text("PASS").first.wait_for(timeout=WAIT_MS)
    text_of(page, "report")
    shown = frame.locator("body").inner_text()
    assert seen.passed.decision.model_sha256 in shown
    assert seen.passed.decision.checks[0].name in shown


def test_the_registry_says_what_runs_on_devices(seen: Seen) -> None:
    said = text_of(seen.page("/models/digits", "Version 1"), "registry")
    assert "@ candidate" in said
    assert "@ champion" in said
    assert "qcore.gate: pass" in said
    page = seen.page("/models/digits/versions/1", "model.sha256")
    version = text_of(page, "version").replace(" ", "")
    assert seen.passed.decision.model_sha256 in version
    assert "digits1.0.0forx86-vnni" in version


def test_the_list_of_runs_explains_itself(seen: Seen) -> None:
    said = text_of(seen.page("/experiments/1/runs", "digits 1.0.0"), "runs")
    assert "Open a run: its description says what was decided and why" in said
