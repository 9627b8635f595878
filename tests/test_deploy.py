"""What deploy/ ships must be what the code reads."""

import configparser
from pathlib import Path

from qcore.device.__main__ import main
from qcore.device.config import load_config

DEVICE = Path(__file__).resolve().parents[1] / "deploy" / "device"


def test_the_example_configuration_is_a_valid_one():
    config = load_config(DEVICE / "device.example.toml")
    assert (config.family, config.channel, config.hardware) == ("digits", "stable", "x86-avx2")
    assert config.state_dir == Path("/var/lib/qcore")


def test_the_service_runs_a_verb_that_exists(capsys):
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str
    unit.read(DEVICE / "qcore-device.service")
    program, *arguments = unit["Service"]["ExecStart"].split()
    assert program.endswith("/qcore-device")
    missing = [a.replace("/etc/qcore/device.toml", "/nowhere/device.toml") for a in arguments]
    assert main(missing) == 1  # understood, and refused for the missing file only
    assert "/nowhere/device.toml" in capsys.readouterr().err
