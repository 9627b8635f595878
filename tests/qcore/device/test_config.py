"""The device's TOML file: every mistake is one line that says what to write instead."""

from pathlib import Path

import onnxruntime
import pytest

from qcore.device.compat import DeviceFacts, device_facts
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
        (GOOD + "cpu_features = 'avx2'", r"cpu_features is 'avx2'; expected a list of strings, e\.g\. \[\"avx2\"\]"),
        (GOOD + "providers = [1]", "providers is .1.; expected a list"),
        (GOOD + "memory_mb = 1.5", "memory_mb is 1.5; expected a number of MiB"),
        (GOOD + "memory_mb = true", "memory_mb is True; expected a number of MiB"),
        (GOOD + "memory_mb = -1", "memory_mb is -1; allowed"),
        (GOOD + "selftest_memory_mb = -1", "selftest_memory_mb is -1; allowed"),
        (GOOD + "control_flow = 1", "control_flow is 1; expected true or false"),
        (GOOD + "onnxruntime = 1.24", "onnxruntime is 1.24; expected a string"),
        (GOOD.replace('"repo"', '""'), "repository is empty"),
        ("= 3", "not valid TOML"),
    ],
)
def test_every_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        load_config(write(tmp_path, text))
    assert "\n" not in str(e.value)


def test_what_a_device_is_may_be_stated(tmp_path: Path) -> None:
    stated = 'cpu_features = ["avx2"]\nmemory_mb = 64\nonnxruntime = "1.24.1"\nproviders = ["P"]\ncontrol_flow = true\n'
    facts = device_facts(load_config(write(tmp_path, GOOD + stated)))
    assert facts == DeviceFacts(
        hardware="x86-vnni",
        cpu_features=frozenset({"avx2"}),
        memory_bytes=64 << 20,
        onnxruntime="1.24.1",
        providers=("P",),
        control_flow=True,
    )


@pytest.mark.parametrize(
    "text", ["processor : 0\nflags\t\t: fpu avx2\nflags : fpu\n", "Features\t: avx2 fpu\n"], ids=["x86", "ARM"]
)
def test_what_is_not_stated_is_asked_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal:       2048 kB\nMemFree: 1 kB\n")
    monkeypatch.setattr("qcore.device.compat.CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("qcore.device.compat.MEMINFO", tmp_path / "meminfo")
    facts = device_facts(load_config(write(tmp_path, GOOD)))
    assert (facts.cpu_features, facts.memory_bytes) == ({"avx2", "fpu"}, 2 << 20)
    assert facts.onnxruntime == onnxruntime.__version__
    assert facts.providers is None


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
