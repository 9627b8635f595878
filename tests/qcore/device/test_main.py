"""`qcore-device` as a program: light, exit codes, one JSON object, one line for every mistake."""

import json
from pathlib import Path

import pytest
from simulators import World, make_world, run_python

from qcore.device.__main__ import main

HEAVY = ("numpy", "onnx", "onnxruntime", "boto3", "pydantic", "torch", "mlflow", "kfp", "typer", "rich")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def write_config(world: World, extra: str = "") -> str:
    path = world.folder / "device.toml"
    path.write_text(
        'device_id = "dev-1"\nhardware = "x86-vnni"\nfamily = "digits"\nrepository = "repo"\n'
        'root = "keys/root.json"\nstate_dir = "state"\nselftest = ["true"]\n' + extra
    )
    return str(path)


def test_the_process_of_an_install_stays_light(world: World) -> None:
    world.publish()
    code = (
        "import sys\nfrom qcore.device.__main__ import main\n"
        f"code = main(['install', '--config', {write_config(world)!r}])\n"
        f"print('heavy', *(m for m in {HEAVY!r} if m in sys.modules))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')), end='')\nsys.exit(code)"
    )
    done = run_python(["-c", code])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2] == "heavy"
    assert int(lines[-1].split()[1]) < 60 * 1024  # KiB; the updater's bar is 60 MB


def test_a_real_process_installs_and_reports(world: World) -> None:
    release = world.publish()
    config = write_config(world)
    done = run_python(["-m", "qcore.device", "install", "--config", config, "--json"])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["version"], answer["sha256"], answer["changed"]) == ("1.0.0", release.sha256, True)


def test_every_verb_answers_people_and_machines(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.publish("1.0.0")
    config = write_config(world)
    assert main(["check", "--config", config]) == 0
    assert "version       1.0.0" in capsys.readouterr().out
    assert main(["install", "--config", config]) == 0
    world.publish("1.1.0", seed=1)
    assert main(["install", "--config", config]) == 0
    capsys.readouterr()
    assert main(["rollback", "--config", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1.0.0"
    assert main(["status", "--config", config]) == 0
    assert "state         serving" in capsys.readouterr().out
    report = world.folder / "out" / "report.json"
    assert main(["report", "--config", config, "--out", str(report)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(report.read_text())


def test_an_error_is_one_line_and_exit_1(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(world)
    assert main(["install", "--config", config, "--json"]) == 1
    found = capsys.readouterr()
    assert json.loads(found.out)["error"] == "E_NO_RELEASE"
    assert found.err.startswith("qcore-device: E_NO_RELEASE: ")
    assert found.err.count("\n") == 1
    assert main(["status", "--config", write_config(world, 'chanel = "x"')]) == 1
    found = capsys.readouterr()
    assert "did you mean 'channel'?" in found.err
    assert found.out == ""


def test_a_state_folder_that_cannot_be_made_is_one_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.folder / "state").write_text("a file")
    assert main(["check", "--config", write_config(world)]) == 1
    assert capsys.readouterr().err.startswith("qcore-device: E_IO: check: ")


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["instal"], "did you mean install?"),
        (["install", "--confg", "x"], "unknown option --confg; did you mean --config?"),
        (["install", "--config", "x", "--jsn"], "did you mean --json?"),
        (["status", "--config", "x", "--retry"], "unrecognized arguments: --retry"),
        ([], "VERB"),
        (["install"], "--config"),
    ],
)
def test_a_misspelt_command_line_is_exit_2_and_one_line(
    args: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert hint in err
    assert err.count("\n") == 1
