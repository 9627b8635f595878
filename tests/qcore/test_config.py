"""What people write wrongly in YAML, and the line that they get: field, observed, all that is allowed, next step."""

import pytest

from qcore.config import check_config, parse_config
from qcore.data.card import DataCard
from qcore.errors import ConfigError
from qcore.policy import GatePolicy
from qcore.recipe import Recipe

STEP = "field 'steps.0.round-weights."
PULL = "a number above 0, auto or null"


def refusal(text, kind=Recipe):
    with pytest.raises(ConfigError) as e:
        parse_config(text, kind, "file")
    assert "\n" not in str(e.value)
    return str(e.value).removeprefix("file: ")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("pull: -5", f"{STEP}pull' is -5; allowed: {PULL}; correct it"),
        ("pull: none", f'{STEP}pull\' is "none"; allowed: {PULL}; YAML writes none as null'),
        ("pull: aut", f'{STEP}pull\' is "aut"; allowed: {PULL}; did you mean auto?'),
        ("pull: true", f"{STEP}pull' is true; allowed: {PULL}; correct it"),
        ("samples: true", f"{STEP}samples' is true; allowed: a whole number of at least 1; correct it"),
        ("samples: 1.5", f"{STEP}samples' is 1.5; allowed: a whole number of at least 1; correct it"),
        ("shrinkage: null", f"{STEP}shrinkage' is null; allowed: a number from 0 to 1 or auto; correct it"),
        ("shrink: [0.9, 2]", f"{STEP}shrink.1' is 2; allowed: a number above 0.1 and at most 1; correct it"),
        ("shrink: [true]", f"{STEP}shrink.0' is true; allowed: a number above 0.1 and at most 1; correct it"),
        (
            "shrink: 0.9",
            f"{STEP}shrink' is 0.9; allowed: a list (each a number above 0.1 and at most 1; not empty) or null; "
            "correct it",
        ),
        ("gian: 1", "unknown field 'steps.0.round-weights.gian'; did you mean 'gain'?"),
    ],
)
def test_options_of_a_step(option, line):
    assert refusal(f"name: a\nsteps: [{{method: round-weights, {option}}}]") == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{ranges: minmax}", "'steps.0.quantize.ranges' is \"minmax\"; allowed: min-max, .* did you mean min-max\\?"),
        ("{precision: {a: 8}}", "'steps.0.quantize.precision.a' is 8; allowed: int16, float16 or float; correct it"),
        ("{exclude: conv}", "'steps.0.quantize.exclude' is \"conv\"; allowed: a list \\(each text\\)"),
    ],
)
def test_words_lists_and_mappings(text, line):
    options = text.removeprefix("{")
    with pytest.raises(ConfigError, match=line):
        parse_config(f"name: a\nsteps: [{{method: quantize, {options}]", Recipe, "file")


def test_methods():
    assert refusal("name: a\nsteps: [{ranges: mse}]") == "field 'steps.0.method' is missing; add it"
    line = refusal("name: a\nsteps: [{method: round-weight}]")
    assert line.startswith("field 'steps.0.method' is \"round-weight\"; allowed: fold-batchnorm, gemm-head,")
    assert line.endswith("; did you mean round-weights?")


def test_other_files_are_refused_in_the_same_words():
    assert refusal("name: a\nsplits: {c: {count: true}}", DataCard).startswith(
        "field 'splits.c.count' is true; allowed"
    )
    assert "'preprocess.0.resize' is [1, 2, 3]; allowed: a whole number above 0" in refusal(
        "name: a\npreprocess: [{resize: [1, 2, 3]}]\nsplits: {}", DataCard
    )
    assert refusal("name: a\nsplits: {2020-01-01: {}}", DataCard).startswith("field 'splits.[name]' is \"2020-01-01\"")
    assert refusal("top1: {max_drop: 2}", GatePolicy) == (
        "field 'top1.max_drop' is 2; allowed: a number above 0 and below 1 or null; correct it"
    )


def test_true_and_false_stay_where_they_are_meant():
    steps = [{"method": "smooth", "insert": True}, {"method": "quantize", "per_channel": False}]
    made = check_config({"name": "a", "steps": steps}, Recipe, "recipe")
    assert check_config(made.model_dump(), Recipe, "recipe") == made
    assert parse_config("name: a\nsplits: {seed: 3, c: {rest: true}}", DataCard, "card").splits["c"].rest is True


def test_an_unknown_field_of_an_optional_mapping_keeps_its_name():
    assert refusal("top1: {max_dropp: 0.01}", GatePolicy) == (
        "unknown field 'top1.max_dropp'; did you mean 'max_drop'?"
    )


OWNED = "waivers: {{owners: [{{name: Ada, key: %s}}], checks: [{}]}}" % ("a" * 64)


@pytest.mark.parametrize(
    ("check", "line"),
    [
        ("latency_ration", "field 'waivers.checks.0' is \"latency_ration\": no check is called so; did you mean "),
        ("parity", "field 'waivers.checks.0' is \"parity\": what was not measured, or not lately, cannot be waived"),
        ("champion", "field 'waivers.checks.0' is \"champion\": what was not measured"),
        ("age_days", "field 'waivers.checks.0' is \"age_days\": what was not measured"),
        ("parity_conditions", "field 'waivers.checks.0' is \"parity_conditions\": what was not measured"),
        ("zzz", "field 'waivers.checks.0' is \"zzz\": no check is called so; allowed: top1_drop, "),
    ],
)
def test_only_checks_that_exist_and_can_be_waived_are_named(check, line):
    assert refusal(f"top1: {{max_drop: 0.01}}\n{OWNED.format(check)}", GatePolicy).startswith(line)


def test_checks_of_users_metrics_are_known_by_the_metrics_that_the_policy_has():
    policy = f"metrics: {{{{overlap: {{{{max_loss: 0.01}}}}}}}}\n{OWNED}"
    assert parse_config(policy.format("overlap_change"), GatePolicy, "file").waivers is not None
    assert "did you mean 'overlap_change'?" in refusal(policy.format("overlop_change"), GatePolicy)
