"""The update: what is installed is what was published; whatever fails, the model that served keeps serving."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from simulators import World, digest, make_world, tiny_model

from qcore.canonical import sha256_bytes
from qcore.device.config import SELFTEST, DeviceConfig
from qcore.device.refusals import refusal
from qcore.device.state import load_state, locked
from qcore.device.updater import check, install, rollback, status
from qcore.errors import ConfigError, UpdateError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def active(config: DeviceConfig) -> str:
    """Return the digest of the model that a service would load."""
    return digest(config.state_dir / "current" / "model.onnx")


def fails(code: int) -> tuple[str, ...]:
    return (sys.executable, "-c", f"print('sorry'); raise SystemExit({code})")


def test_install_brings_exactly_the_published_bytes(world: World) -> None:
    release = world.publish("1.0.0")
    config = world.device(selftest=SELFTEST)
    assert check(config).action == "install"
    done = install(config)
    assert (done.version, done.sha256, done.changed) == ("1.0.0", release.sha256, True)
    assert active(config) == release.model_sha256 == done.model_sha256 == sha256_bytes(tiny_model(0))
    assert done.slot == (config.state_dir / "current").resolve()
    assert check(config).action == "current"
    assert replace(install(config), changed=True) == done
    assert not install(config).changed


def test_new_release_then_rollback(world: World) -> None:
    config = world.device()
    world.publish("1.0.0", seed=0)
    install(config)
    world.publish("1.1.0", seed=1)
    assert install(config).version == "1.1.0"
    assert active(config) == sha256_bytes(tiny_model(1))
    assert status(config)["previous"] == "1.0.0"

    assert rollback(config).version == "1.0.0"
    assert active(config) == sha256_bytes(tiny_model(0))
    with pytest.raises(UpdateError, match="E_NO_PREVIOUS"):
        rollback(config)
    with pytest.raises(UpdateError, match=r"E_QUARANTINED: 1\.1\.0 failed here before \(rolled back by hand\)"):
        install(config)
    assert install(config, retry=True).version == "1.1.0"
    assert not load_state(config.state_dir).quarantine

    world.publish("1.2.0", seed=2)
    assert install(config).version == "1.2.0"
    assert sorted(p.name for p in (config.state_dir / "slots").iterdir()) == sorted(
        os.path.basename(os.readlink(config.state_dir / link)) for link in ("current", "previous")
    )


def test_a_failed_self_test_keeps_the_old_model_and_quarantines_the_new_one(world: World) -> None:
    config = world.device(selftest=SELFTEST)
    world.publish("1.0.0", seed=0)
    install(config)
    bad = world.publish("1.1.0", seed=1, error=0.5)  # its golden samples are not what it computes
    with pytest.raises(
        UpdateError, match=r"E_SELFTEST: 1\.1\.0 failed its self-test here: .*golden samples: error 0\.5"
    ):
        install(config)
    assert active(config) == sha256_bytes(tiny_model(0))
    assert bad.sha256 in load_state(config.state_dir).quarantine
    assert not (config.state_dir / "slots" / bad.sha256).exists()
    with pytest.raises(UpdateError, match="E_QUARANTINED"):
        install(config)
    assert check(config).action == "quarantined"
    world.publish("1.2.0", seed=2)
    assert install(config).version == "1.2.0"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (fails(1), "exit 1: sorry"),
        ((sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"), "exit -11: no output"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), r"no answer in 0\.5 s"),
    ],
    ids=["says no", "crashes", "hangs"],
)
def test_a_model_that_fails_crashes_or_hangs_is_quarantined(
    world: World, command: tuple[str, ...], message: str
) -> None:
    release = world.publish()
    config = world.device(selftest=command, selftest_timeout_s=0.5 if "sleep" in command[2] else 30)
    with pytest.raises(UpdateError, match=f"E_SELFTEST.*{message}"):
        install(config)
    assert release.sha256 in load_state(config.state_dir).quarantine
    assert not (config.state_dir / "current").exists()


@pytest.mark.parametrize("command", [fails(2), ("/no/such/command",)], ids=["cannot test", "no command"])
def test_a_self_test_that_cannot_run_says_nothing_about_the_model(world: World, command: tuple[str, ...]) -> None:
    world.publish()
    with pytest.raises(UpdateError, match="E_SELFTEST"):
        install(world.device(selftest=command))
    assert not load_state(world.device().state_dir).quarantine
    assert install(world.device()).version == "1.0.0"


def test_wrong_hardware_is_refused_before_the_download(world: World) -> None:
    release = world.publish()
    world.object_path(release).unlink()
    with pytest.raises(
        UpdateError, match=r"E_INCOMPATIBLE: 1\.0\.0 is for hardware x86-vnni, this device is arm-dotprod"
    ):
        install(world.device(hardware="arm-dotprod"))


def test_nothing_offered_and_nothing_reachable_have_their_codes(world: World) -> None:
    for changes in ({}, {"family": "other"}, {"channel": "beta"}):
        with pytest.raises(UpdateError, match="E_NO_RELEASE"):
            check(world.device(**changes))
    with pytest.raises(UpdateError, match="E_UNREACHABLE"):
        check(world.device(repository="http://127.0.0.1:9/repo", name="far"))
    with pytest.raises(UpdateError, match="E_UNREACHABLE"):
        check(world.device(repository=str(world.folder / "none"), name="gone"))
    with pytest.raises(ConfigError, match=r"root .* cannot be read"):
        check(world.device(root=world.folder / "none.json"))


def test_a_second_agent_is_turned_away(world: World) -> None:
    world.publish()
    config = world.device()
    with locked(config.state_dir), pytest.raises(UpdateError, match="E_BUSY: another qcore-device"):
        install(config)
    assert install(config).version == "1.0.0"


def test_a_damaged_active_model_is_noticed_and_installed_again(world: World) -> None:
    release = world.publish()
    config = world.device()
    model = install(config).slot / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    assert status(config)["state"] == "broken"
    assert install(config).changed
    assert active(config) == release.model_sha256
    assert status(config)["state"] == "serving"


def test_rollback_to_a_damaged_model_is_refused(world: World) -> None:
    config = world.device()
    world.publish("1.0.0")
    old = install(config)
    world.publish("1.1.0", seed=1)
    new = install(config)
    (old.slot / "model.onnx").write_bytes(b"x")
    with pytest.raises(UpdateError, match="E_HASH"):
        rollback(config)
    assert active(config) == new.model_sha256


def test_leftovers_of_a_killed_run_are_swept(world: World) -> None:
    config = world.device()
    world.publish()
    half = config.state_dir / "slots" / f"{'0' * 64}.tmp"
    half.mkdir(parents=True)
    (half / "model.onnx").write_bytes(b"half")
    (config.state_dir / "downloads").mkdir()
    (config.state_dir / "downloads" / "x.part").write_bytes(b"half")
    install(config)
    assert not half.exists()
    assert list((config.state_dir / "downloads").iterdir()) == []


def test_a_full_disk_keeps_the_old_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.device()
    world.publish("1.0.0")
    install(config)
    world.publish("1.1.0", seed=1)
    monkeypatch.setattr("qcore.device.source.RESERVE_BYTES", 1 << 60)
    with pytest.raises(UpdateError, match=r"E_NOSPACE: .* bytes free"):
        install(config)
    monkeypatch.undo()
    assert active(config) == sha256_bytes(tiny_model(0))
    assert install(config).version == "1.1.0"


def test_a_damaged_state_file_is_not_guessed_around(world: World) -> None:
    world.publish()
    config = world.device()
    install(config)
    (config.state_dir / "state.json").write_text("{")
    for call in (check, install, status):
        with pytest.raises(UpdateError, match="E_STATE"):
            call(config)
    assert active(config) == sha256_bytes(tiny_model(0))


def test_status_reports_what_a_fleet_needs_to_know(world: World) -> None:
    config = world.device()
    assert status(config)["state"] == "empty"
    release = world.publish()
    install(config)
    with pytest.raises(UpdateError, match="E_INCOMPATIBLE"):
        check(replace(config, hardware="arm-dotprod"))
    found = json.loads(json.dumps(status(config)))
    assert (found["device_id"], found["state"], found["error"], found["epoch"]) == (
        "dev-1",
        "serving",
        "E_INCOMPATIBLE",
        1,
    )
    assert found["active"]["version"] == "1.0.0"
    assert found["active"]["sha256"] == release.sha256
    assert found["last"]["verb"] == "check"
    assert found["clock"].endswith("+00:00")


def test_a_refusal_is_always_one_line() -> None:
    assert str(refusal("E_X", "a\n  b")) == "E_X: a b"
