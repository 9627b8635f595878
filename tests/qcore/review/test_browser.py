"""The page as people see it, in headless Chromium at the width of a desk and of a phone.

Needs Debian's `chromium` and `pip install playwright`; skipped without them. `$QCORE_SHOTS` keeps pictures in a folder.
"""

import os
import shutil
from pathlib import Path

import pytest
from reviewing import drawn, everything

from qcore.review.facts import review
from qcore.review.page import to_html
from qcore.review.source import Sources

pytestmark = pytest.mark.browser

WIDTHS = {"desk": 1280, "phone": 390}
LONG = "a_name_without_a_place_to_break_" * 6


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page with everything, many classes and layers, and names that do not break."""
    classes = {k: f"class {k}" for k in range(100)}
    first = everything("first", drawn(n=3000, classes=100, changed=0.02), says=LONG, layers=120)
    second = everything("second", drawn(n=3000, classes=100, seed=1, model="c" * 64), qat=True, layers=120)
    found = review(Sources(candidates=(first, second), title=f"net {LONG}", classes=classes))
    path = tmp_path_factory.mktemp("page") / "review.html"
    path.write_text(to_html(found), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_asks_for_nothing(chromium, page_file, width, scheme):
    page = chromium.new_page(viewport={"width": WIDTHS[width], "height": 844}, color_scheme=scheme)
    requests, said = [], []
    page.on("request", lambda r: requests.append(r.url))
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert requests == [page_file.as_uri()]
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    outside = page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') &&
               e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + e.textContent.slice(0, 40))"""
    )
    assert outside == []
    assert page.locator("h2").count() >= 13
    assert page.locator("svg").count() >= 11
    assert page.locator("header.inconclusive .verdict").inner_text().startswith("INCONCLUSIVE: ")
    assert page.locator("td .badge.pass").first.inner_text() == "✓ pass"
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.querySelector('section')).{name}")
        for name in ("color", "backgroundColor")
    )
    assert contrast(ink, paper) > 7
    if "QCORE_SHOTS" in os.environ:
        shot = Path(os.environ["QCORE_SHOTS"]) / f"review-{width}-{scheme}.png"
        page.screenshot(path=str(shot), full_page=True)
    page.close()


def test_every_badge_can_be_read_on_both_backgrounds(chromium, page_file):
    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        paper = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
        colours = page.evaluate(
            "[...document.querySelectorAll('.badge, .sub, th')].map(e => getComputedStyle(e).color)"
        )
        assert min(contrast(c, paper) for c in set(colours)) >= 4.5  # WCAG 2.2, 1.4.3
        page.close()


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two `rgb(r, g, b)` colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
