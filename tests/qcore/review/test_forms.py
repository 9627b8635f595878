"""Page, Markdown and JSON: the same facts, nothing from outside read as markup, and sizes that stay bounded."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reviewing import classified, drawn, everything, regression

from qcore.canonical import canonical_json
from qcore.report import Check, Group, outcome_of
from qcore.review.document import to_json
from qcore.review.facts import digests, review
from qcore.review.markdown import DESCRIPTION, to_markdown
from qcore.review.page import to_html
from qcore.review.sections import sections
from qcore.review.source import Candidate, NoRanges, Sources, one_candidate

NASTY = '</title><script>alert(1)</script><img src=x onerror="alert(2)">|`x`*b*[l](http://evil)\n# h $\\frac{x$ &amp;'


def both() -> Sources:
    first, second = (
        everything("first", drawn(), layers=12),
        everything("second", drawn(seed=1, model="c" * 64), qat=True),
    )
    return Sources(candidates=(first, second), title="net", classes={0: "cat", 1: "dog"})


def sources(kind: str) -> Sources:
    return {
        "everything": both,
        "bare": lambda: one_candidate(drawn(), None),
        "unlabelled": lambda: one_candidate(classified(None, [0, 1, 2], [0, 1, 1]), None),
        "regression": lambda: one_candidate(regression([1.0] * 9, [1.1] * 9), None),
    }[kind]()


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.text += "\n" if tag in ("td", "th", "p", "h2") else ""
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_data(self, data):
        self.text += data


def tables_of(markdown: str) -> list[list[str]]:
    """Return the lines of every table."""
    blocks = re.split(r"\n\s*\n", markdown)
    return [b.splitlines() for b in blocks if b.startswith("|")]


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize("kind", ["everything", "bare", "unlabelled", "regression"])
def test_the_three_forms_say_the_same(kind):
    found = review(sources(kind))
    document, page, text = to_json(found), Page(to_html(found)), to_markdown(found)
    assert json.loads(canonical_json(document))["verdict"] == found.verdict
    assert text.startswith(f"**{found.verdict.split(':')[0]}")
    for said in (found.verdict, found.sure):
        assert said in page.text
    for section in sections(found):
        assert section.title in page.text
        for table in section.tables:
            assert all(len(row) == len(table.header) for row in table.rows)
            assert all(cell in page.text for row in table.rows for cell in row)
    digests = set(re.findall(r"\b[0-9a-f]{64}\b", text))
    assert digests
    assert digests <= set(re.findall(r"\b[0-9a-f]{64}\b", json.dumps(document)))
    assert digests <= set(re.findall(r"\b[0-9a-f]{64}\b", page.text))


def test_what_is_limited_on_the_page_is_whole_in_the_document():
    report = drawn(n=5000, classes=100, changed=0.5)
    found = review(one_candidate(report, None))
    flips = to_json(found)["candidates"][0]["flips"]
    wrong = sum(b != c for b, c in zip(report.samples.baseline, report.samples.candidate, strict=True))
    assert sum(map(len, flips.values())) == wrong > 1000
    assert len(to_json(found)["candidates"][0]["classes"]) == 100
    page = Page(to_html(found)).text
    assert f"{len(flips['right_to_wrong']):,} right -> wrong" in page
    assert "further classes; review.json has all" in page


def test_one_row_holds_float_and_every_candidate_for_each_question():
    (first, *_) = sections(review(both()))
    header = list(first.tables[0].header)
    sides = ["float", "PTQ first", "QAT second"]
    assert header == ["model", *(f"{q}: {s}" for q in ("top-1 accuracy", "latency", "size") for s in sides)]
    assert len(first.tables[0].rows) == 1


def test_the_page_needs_nothing_and_reads_no_name_as_markup():
    names = {0: NASTY, 1: NASTY}
    report = drawn(slices={NASTY: tuple(range(60))})
    found = review(Sources(candidates=(everything(NASTY, report, says=NASTY, qat=True),), title=NASTY, classes=names))
    html = to_html(found)
    page = Page(html)
    allowed = {"svg", "defs", "style", "g", "path", "use", "text", "clippath", "rect", "metadata"}
    assert not page.tags & {"script", "img", "link", "iframe", "object", "form", "input", "base"}
    assert page.tags & allowed
    outside = [(k, v) for k, v in page.attributes if k in ("href", "xlink:href", "src") and not v.startswith("#")]
    assert outside == []
    assert [k for k, _ in page.attributes if k.startswith("on")] == []
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert "alert(1)" in page.text
    text = to_markdown(found)
    assert "<" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not re.search(r"^# h", text, re.MULTILINE)


def test_a_description_answers_the_six_questions_and_fits():
    text = to_markdown(review(both()))
    assert len(text) <= DESCRIPTION
    for question in ("### What changed", "**PASS", "How sure", "### What it costs", "exactly was judged and shipped"):
        assert question in text
    assert "### Who may override" in text
    assert "9" * 64 in text  # the package
    assert "a" * 64 in text


QUESTIONS = (
    "Float and candidates",
    "Gate",
    "What changed",
    "What it costs",
    "What exactly was judged and shipped",
    "Who may override",
)


def many_checks(outcomes) -> Sources:
    """Return one candidate under a decision of many checks, each with groups."""
    whole = everything("a", drawn())
    checks = tuple(
        Check(
            name=f"check{k}_drop",
            outcome=outcome,
            observed=-0.02,
            bound=-0.03,
            limit=-0.05 if outcome == "pass" else -0.01,
            reason=f"reason of check {k} " * 8,
            groups=tuple(
                Group(name=f"class {g}", support=30, outcome=outcome, observed=0.0, bound=-0.1, reason="few " * 30)
                for g in range(18)
            ),
        )
        for k, outcome in enumerate(outcomes)
    )
    decision = replace(whole.decision, checks=checks, outcome=outcome_of(checks))
    return Sources(candidates=(replace(whole, decision=decision),))


def test_a_description_shows_what_fails_first_and_answers_every_question():
    text = to_markdown(review(many_checks(["pass"] * 30 + ["fail"] * 2 + ["inconclusive"])))
    assert len(text) <= DESCRIPTION
    (checks,) = (t for t in tables_of(text) if t[0].startswith("| check |"))
    assert [re.match(r"\| check(\d+)_drop", line)[1] for line in checks[2:5]] == ["30", "31", "32"]
    assert all(f"### {title}\n" in text for title in QUESTIONS)
    assert "30 tables of groups that pass" in text
    sure = review(many_checks(["pass"] * 30 + ["fail"] * 2 + ["inconclusive"] * 3)).sure
    assert "check30_drop (fail) was seen at -2.00 points and is at worst -3.00 points" in sure
    assert "and 2 more" in sure


def test_only_a_decision_that_somebody_vouches_for_is_shown_without_a_warning():
    whole = both()
    shown, vouched = review(whole), review(replace(whole, vouched=True))
    said = "Signature not checked here: `qcore gate verify` does."
    assert said == shown.signature == to_json(shown)["signature"]
    assert said in to_markdown(shown)
    assert said in Page(to_html(shown)).text
    assert "ignature not checked" not in to_markdown(vouched) + to_html(vouched)


def test_why_there_are_no_histograms_is_said():
    whole = everything("a", drawn())
    why = NoRanges(model_sha256="a" * 64, why="no histograms, because it is so.")
    found = review(Sources(candidates=(replace(whole, ranges=None, no_ranges=why),)))
    assert "no histograms, because it is so." in Page(to_html(found)).text
    assert "calibration samples" not in digests(found.judged)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)


@pytest.mark.parametrize("fails", [1, 10, 40])
def test_the_six_questions_are_there_however_much_fails(fails):
    text = to_markdown(review(many_checks(["fail"] * fails + ["pass"] * 9)))
    assert len(text) <= DESCRIPTION
    assert [len(re.findall(f"^### {t}$", text, re.MULTILINE)) for t in QUESTIONS] == [1] * len(QUESTIONS)
    (checks,) = (t for t in tables_of(text) if t[0].startswith("| check |"))
    assert "| fail |" in checks[2]


@settings(max_examples=25, deadline=None)
@given(texts, st.integers(1, 12), st.integers(1000, DESCRIPTION), st.integers(0, 400))
def test_a_description_is_never_cut_inside_a_table(says, candidates, limit, layers):
    many = tuple(
        everything(f"{k} {says}", drawn(n=60, seed=k, model=f"{k:064x}"), says=says, layers=layers)
        for k in range(candidates)
    )
    found = review(Sources(candidates=many, title=says, classes={0: says}))
    text = to_markdown(found, limit=limit)
    assert len(text) <= limit
    for table in tables_of(text):
        assert len(table) > 2
        assert {cells(line) for line in table} == {cells(table[0])}
    left = [s.title for s in sections(found) if f"### {s.title}\n" not in text]
    assert all(title in text.splitlines()[-1] for title in left)


def test_the_same_review_gives_the_same_bytes():
    assert to_html(review(both())) == to_html(review(both()))
    assert canonical_json(to_json(review(both()))) == canonical_json(to_json(review(both())))


def test_a_large_review_stays_small():
    classes = {k: f"class with a long name number {k}" for k in range(1000)}
    many = tuple(
        everything(f"c{k}", drawn(n=50_000, classes=1000, seed=k, changed=0.2, model=f"{k:064x}"), layers=300)
        for k in range(3)
    )
    found = review(Sources(candidates=many, classes=classes))
    assert len(to_html(found).encode()) < 2_000_000
    assert len(to_markdown(found)) <= DESCRIPTION


def test_letters_and_colours_do_not_run_out():
    many = tuple(Candidate(name=f"c{k}", report=drawn(n=30, seed=k, model=f"{k:064x}")) for k in range(30))
    page = Page(to_html(review(Sources(candidates=many)))).text
    assert "A1 c26" in page


def test_a_regression_shows_the_samples_whose_error_grew_most():
    found = review(one_candidate(regression([1.0, 1.0, 1.0], [0.5, 4.0, 2.0]), None))
    (section,) = (s for s in sections(found) if s.key == "flips")
    assert [row[0] for row in section.tables[0].rows] == ["1", "2"]
