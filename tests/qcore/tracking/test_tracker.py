import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kfp import dsl

from qcore.errors import DataError
from qcore.methods.finetune import Epoch
from qcore.tracking.journal import End, Line, Metrics, Start, journals, read_journal
from qcore.tracking.tracker import Tracker

Serve = Callable[[str], str]


def lines_of(folder: Path) -> list[Line]:
    return read_journal(journals(folder)[-1])


def test_a_failure_is_journalled_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(DataError), Tracker("evaluate", env={"QCORE_JOURNAL_DIR": str(tmp_path)}):
        raise DataError("x.npz: 3 NaN; clean it")
    first, *_, last = lines_of(tmp_path)
    assert isinstance(first, Start)
    assert first.task == "evaluate"
    assert isinstance(last, End)
    assert (last.status, last.error) == ("FAILED", ("DataError", "x.npz: 3 NaN; clean it"))


def test_an_interrupt_is_not_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker("evaluate", env={"QCORE_JOURNAL_DIR": str(tmp_path)}):
        raise KeyboardInterrupt
    last = lines_of(tmp_path)[-1]
    assert isinstance(last, End)
    assert last.status == "KILLED"


def test_only_finite_numbers_with_legal_names_are_tracked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kfp = dsl.Metrics(name="m", uri=str(tmp_path / "m"))
    with Tracker("evaluate", env={"QCORE_JOURNAL_DIR": str(tmp_path)}) as t:
        t.metrics({"top1": 0.5, "acc@1 (x)": 1, "bad": float("nan"), "worse": float("inf")}, kfp=kfp)
    tracked = next(x for x in lines_of(tmp_path) if isinstance(x, Metrics))
    assert tracked.values == {"top1": 0.5, "acc_1 _x_": 1.0}
    assert tracked.in_kfp
    assert kfp.metadata == {"top1": 0.5, "acc_1 _x_": 1.0}
    assert {r.args[0] for r in caplog.records if isinstance(r.args, tuple)} == {"bad", "worse"}


def test_progress_is_rare_and_its_end_is_never_lost(tmp_path: Path) -> None:
    with Tracker("calibrate", env={"QCORE_JOURNAL_DIR": str(tmp_path)}) as t:
        for i in range(10_000):
            t.progress("samples", i + 1, 10_000)
    text = journals(tmp_path)[0].read_text()
    assert text.count('"op":"progress"') < 50
    assert '"done":10000' in text


def test_without_a_place_nothing_is_written_and_nothing_fails(tmp_path: Path) -> None:
    with Tracker("prune", env={}) as t:
        t.params({"a": 1})
        t.artifact(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_written_does_not_stop_the_task(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with Tracker("prune", env={"QCORE_JOURNAL_DIR": str(tmp_path / "file" / "below")}) as t:
        t.params({"a": 1})
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_a_task_never_imports_mlflow_or_kfp() -> None:
    code = (
        "import sys; from qcore.tracking import tracker, verdict, facts, replay, uploader\n"
        "print([m for m in ('mlflow', 'kfp', 'numpy', 'onnx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class Sick(BaseHTTPRequestHandler):
    illness = ""

    def answer(self) -> None:
        if self.illness == "hangs":
            time.sleep(30)
        status, body = {
            "500": (500, b"oops"),
            "403": (403, b"Invalid Host header - possible DNS rebinding attack detected"),
            "html": (200, b"<html>login</html>"),
            "list": (200, b"[]"),
        }.get(self.illness, (500, b""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers = []

    def start(illness: str) -> str:
        handler = type("Handler", (Sick,), {"illness": illness})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        servers.append(server)
        if illness == "refuses":
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        if server.socket.fileno() != -1:
            server.shutdown()
            server.server_close()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("illness", ["500", "403", "html", "list", "refuses", "hangs"])
def test_a_sick_server_costs_seconds_and_one_warning(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, illness: str, training: bool
) -> None:
    env = {"MLFLOW_TRACKING_URI": serve(illness), "QCORE_RUN_KEY": "k", "QCORE_JOURNAL_DIR": str(tmp_path)}
    started = time.monotonic()
    with Tracker("gate", env=env) as t:
        t.metrics({"top1": 0.5})
        for k in range(1000 if training else 0):
            t.epoch(Epoch(number=k, loss=1.0, validation=1.0, accuracy=None, seconds=1.0))
    assert time.monotonic() - started < 10.0
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "\n" not in message
    assert "qcore mlflow replay" in message
    assert ("--allowed-hosts" in message) == (illness == "403")
    assert isinstance(lines_of(tmp_path)[-1], End)
