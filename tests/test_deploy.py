"""What deploy/ ships must be what the code reads."""

import configparser
from pathlib import Path

import typer
import yaml

from qcore import __version__, steps
from qcore.cli.main import app
from qcore.device.__main__ import main
from qcore.device.config import load_config
from qcore.steps.finetuning import recipe_of
from qcore.target import load_target

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


TRAIN = DEVICE.parents[0] / "kubernetes" / "train" / "trainjob.yaml"


def test_the_train_job_runs_a_command_line_that_exists():
    job = yaml.safe_load(TRAIN.read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = job["spec"]["trainer"]
    assert trainer["image"] == f"localhost/kfp-qcore/qcore:{__version__}"
    assert trainer["numNodes"] > 1
    torchrun, module, name, verb, *arguments = trainer["command"]
    assert (torchrun, module, name, verb) == ("torchrun", "-m", "qcore", "finetune")
    command = typer.main.get_command(app).commands[verb]
    parsed = command.make_context(verb, list(arguments)).params  # a wrong option or value ends here
    assert recipe_of(steps.Finetuning(method=parsed["method"].value, epochs=parsed["epochs"])).training_steps
    assert load_target(parsed["target"])


def test_the_train_job_mounts_what_its_command_names():
    job = yaml.safe_load(TRAIN.read_text())
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (node["name"], container["name"]) == ("node", "node")
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts.keys() == {v["name"] for v in pod["volumes"]}
    named = ("--model", "--data", "--out")
    paths = [a.partition("=")[2] for a in job["spec"]["trainer"]["command"] if a.startswith(named)]
    assert len(paths) == 3
    assert all(p.startswith(f"{mounts['work']}/") for p in paths)
