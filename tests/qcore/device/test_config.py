"""The device's TOML file: every mistake is one line that says what to write instead."""

from pathlib import Path

import pytest

from qcore.device.config import SELFTEST, load_config
from qcore.errors import ConfigError

GOOD = """
device_id = "dev-1"
hardware = "x86-vnni"
family = "digits"
repository = "repo"
root = "root.json"
state_dir = "state"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "device.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_defaults_are_there(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.root == tmp_path / "root.json"
    assert config.state_dir == tmp_path / "state"
    assert config.repository == str(tmp_path / "repo")
    assert (config.channel, config.selftest, config.selftest_timeout_s) == ("stable", SELFTEST, 60.0)


def test_an_address_stays_an_address(tmp_path: Path) -> None:
    text = GOOD.replace('"repo"', '"https://models.example/repo"') + 'selftest = ["sh", "-c", "true"]\nchannel = "beta"'
    config = load_config(write(tmp_path, text))
    assert config.repository == "https://models.example/repo"
    assert (config.selftest, config.channel) == (("sh", "-c", "true"), "beta")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + 'chanel = "x"', "unknown key 'chanel'; did you mean 'channel'?"),
        (GOOD + "zzz = 1", "unknown key 'zzz'; allowed: device_id"),
        (GOOD.replace("root =", "roots ="), "unknown key 'roots'; did you mean 'root'?"),
        (GOOD.replace('family = "digits"', ""), "missing keys: family"),
        (GOOD.replace('"digits"', "3"), "family is 3; expected a string"),
        (GOOD.replace('"digits"', '"../x"'), r"family '\.\./x' is not allowed"),
        (GOOD + "selftest = 'true'", "selftest is 'true'; expected a list"),
        (GOOD + "selftest = []", "selftest is empty"),
        (GOOD + "selftest_timeout_s = 0", "selftest_timeout_s is 0; allowed"),
        (GOOD + "selftest_timeout_s = nan", "selftest_timeout_s is nan; allowed"),
        (GOOD + "selftest_timeout_s = 'x'", "expected a number of seconds"),
        (GOOD.replace('"repo"', '""'), "repository is empty"),
        ("= 3", "not valid TOML"),
    ],
)
def test_every_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        load_config(write(tmp_path, text))
    assert "\n" not in str(e.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
