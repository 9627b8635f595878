"""The S3 store through a network that goes wrong: its answer is right, or an error in one line that says what to do."""

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_s3 import Fault, Proxy, faulty
from s3_server import BUCKET, SECRET, Server

from qcore.errors import DoubtfulWriteError, ReleaseError
from qcore.release import s3 as module
from qcore.release.s3 import S3Store, open_s3

Opened = Callable[..., tuple[S3Store, Proxy]]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def through(s3_environment: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Return a function that opens a fresh store behind a proxy with these faults."""
    opened = []

    def open_behind(*faults: Fault) -> tuple[S3Store, Proxy]:
        context = faulty(s3_environment.endpoint, *faults)
        proxy = context.__enter__()
        opened.append(context)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        return open_s3(f"s3://{BUCKET}/{uuid.uuid4().hex}", read_timeout_s=1.0), proxy

    yield open_behind
    for context in opened:
        context.__exit__(None, None, None)


@contextmanager
def honest(store: S3Store, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """Yield the same place without a proxy: what is really there."""
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        yield open_s3(f"s3://{store.bucket}/{store.prefix}")


def bytes_at(store: S3Store, key: str) -> bytes | None:
    found = store.get(key)
    return found.data if found is not None else None


PASSING = {
    "409 once": Fault("refuse", "PUT", "k", 1, 409, "ConditionalRequestConflict"),
    "409 five times": Fault("refuse", "PUT", "k", 5, 409, "ConditionalRequestConflict"),
    "SlowDown five times": Fault("refuse", "PUT", "k", 5, 503, "SlowDown"),
    "500 before the write": Fault("refuse", "PUT", "k", 3, 500, "InternalError"),
    "500 after the write": Fault("apply and refuse", "PUT", "k", 1, 500, "InternalError"),
    "412 after the write": Fault("apply and refuse", "PUT", "k", 1, 412, "PreconditionFailed"),
    "503 after the write": Fault("apply and refuse", "PUT", "k", 1, 503, "ServiceUnavailable"),
    "no answer after the write": Fault("apply and hang", "PUT", "k", 1),
    "closed after the write": Fault("apply and close", "PUT", "k", 1),
    "closed before the write": Fault("close", "PUT", "k", 2),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
@pytest.mark.parametrize("swap", [False, True], ids=["create", "swap"])
def test_a_write_that_came_through_is_said_to(
    through: Opened, s3_environment: Server, monkeypatch: pytest.MonkeyPatch, fault: Fault, swap: bool
) -> None:
    store, proxy = through()
    if swap:
        assert store.put_if_absent("k", b"old")
    found = store.get("k")
    proxy.faults.append(Fault(**{f: getattr(fault, f) for f in fault.__dataclass_fields__}))
    done = store.put_if_match("k", b"new", found.etag) if found is not None else store.put_if_absent("k", b"new")
    assert done is True
    assert proxy.spent()
    with honest(store, s3_environment, monkeypatch) as real:
        assert bytes_at(real, "k") == b"new"


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_write_that_lost_is_said_to_have_lost(through: Opened, fault: Fault) -> None:
    """Another wrote the very same bytes before: still not ours, or two would count one change."""
    store, proxy = through()
    store.put_if_absent("k", b"1")
    old = store.get("k")
    assert old is not None
    assert store.put_if_match("k", b"2", old.etag)
    proxy.faults.append(Fault(**{f: getattr(fault, f) for f in fault.__dataclass_fields__}))
    assert store.put_if_absent("k", b"2") is False
    proxy.faults[:] = [Fault("refuse", "PUT", "k", 2, 409, "ConditionalRequestConflict")]
    assert store.put_if_match("k", b"2", old.etag) is False
    assert bytes_at(store, "k") == b"2"


def test_a_lost_answer_and_a_later_writer_leave_doubt_and_it_is_said(
    through: Opened, s3_environment: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = through()
    store.put_if_absent("k", b"1")
    old = store.get("k")
    assert old is not None
    proxy.faults.append(Fault("apply and hang", "PUT", "k", 1, hang_s=2.5))
    with honest(store, s3_environment, monkeypatch) as real:

        def overtake() -> None:
            while (found := real.get("k")) is None or found.data != b"2":
                pass
            assert real.put_if_match("k", b"3", found.etag)

        other = threading.Thread(target=overtake)
        other.start()
        with pytest.raises(DoubtfulWriteError, match="whether the write counted is not known"):
            store.put_if_match("k", b"2", old.etag)
        other.join()
        assert bytes_at(real, "k") == b"3"


def test_a_swap_of_what_is_gone_is_refused_as_aws_says_it(through: Opened) -> None:
    store, proxy = through()
    proxy.faults.append(Fault("refuse", "PUT", "k", 1, 404, "NoSuchKey"))
    assert store.put_if_match("k", b"1", '"x"') is False


@pytest.mark.parametrize("what", ["cut", "shorten"])
def test_a_cut_body_is_read_again_and_never_returned(through: Opened, what: str) -> None:
    store, proxy = through()
    store.put_if_absent("k", bytes(range(256)) * 100)
    proxy.faults.append(Fault(what, "GET", "k", 3))  # type: ignore[arg-type]  # parametrized literal
    assert bytes_at(store, "k") == bytes(range(256)) * 100
    assert proxy.spent()
    proxy.faults.append(Fault(what, "GET", "k", 1000))  # type: ignore[arg-type]  # parametrized literal
    refused(lambda: store.get("k"), "cannot read k", "6 times")


def test_a_stale_read_never_makes_a_swap_of_other_bytes(through: Opened) -> None:
    store, proxy = through()
    store.put_if_absent("k", b"1")
    first = store.get("k")
    assert first is not None
    assert store.put_if_match("k", b"2", first.etag)
    proxy.faults.append(Fault("stale", "GET", "k", 2))
    stale = store.get("k")
    assert stale == first
    assert store.put_if_match("k", b"3", stale.etag) is False, "one more stale read, then the present one"
    assert bytes_at(store, "k") == b"2"
    proxy.faults.append(Fault("stale", "GET", "k", 1000))
    refused(lambda: store.put_if_match("k", b"3", first.etag), "412 though the object is as it was read", "repo doctor")


LASTING = {
    "SlowDown": (Fault("refuse", "", "", 1000, 503, "SlowDown"), "503 SlowDown (6 times)", "same command again"),
    "409": (Fault("refuse", "PUT", "", 1000, 409, "OperationAborted"), "409 OperationAborted (6 times)", "again"),
    "500": (Fault("refuse", "", "", 1000, 500, "InternalError"), "500 InternalError (6 times)", "again"),
    "closed": (Fault("close", "", "", 1000), "ConnectionClosedError (6 times)", "server and network"),
    "no right": (Fault("refuse", "", "", 1000, 403, "AccessDenied"), "403 AccessDenied", "docs/stores.md"),
    "no conditions": (Fault("refuse", "PUT", "", 1000, 501, "NotImplemented"), "501 NotImplemented", "repo doctor"),
    "wrong region": (Fault("refuse", "", "", 1000, 400, "AuthorizationHeaderMalformed"), "400", "region"),
    "412 without an object": (Fault("refuse", "PUT", "", 1000, 412, "PreconditionFailed"), "412 though", "repo doctor"),
    "a proxy's page": (Fault("refuse", "", "", 1000, 418, "<b>tea"), "418", "again"),
}


@pytest.mark.parametrize(("fault", "observed", "hint"), LASTING.values(), ids=LASTING.keys())
def test_what_does_not_pass_is_one_line(through: Opened, fault: Fault, observed: str, hint: str) -> None:
    store, proxy = through()
    for method in ("GET", "PUT", "DELETE"):
        if fault.method in ("", method):
            proxy.faults.append(Fault(fault.what, method, "", 1000, fault.status, fault.code))
    written = refused(lambda: store.put_if_absent("k", b"1"), "cannot write k", observed, hint)
    if not fault.method:
        assert "500" not in observed or "whether it counted is not known" in written
        refused(lambda: store.get("k"), "cannot read k", observed, hint)
        refused(lambda: store.list(""), "cannot list", observed, hint)
        refused(lambda: store.remove("k"), "cannot remove k", observed, hint)


def refused(call: Callable[[], object], *parts: str) -> str:
    """Return the one line that the call ended in, which holds all parts and no secret."""
    with pytest.raises(ReleaseError) as e:
        call()
    message = str(e.value)
    assert [p for p in parts if p not in message] == [], message
    assert "\n" not in message
    assert SECRET not in message
    return message


def test_a_server_that_is_not_there_is_one_line(s3_environment: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:{SECRET}@127.0.0.1:{s.getsockname()[1]}")
        store = open_s3(f"s3://{BUCKET}/x")
        refused(lambda: store.get("k"), "EndpointConnectionError (6 times) from 127.0.0.1:", "check server and network")


def test_wrong_keys_no_keys_and_a_bucket_that_is_not_there_are_one_line(
    s3_environment: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(lambda: open_s3("s3://no-such-bucket/x").get("k"), "404 NoSuchBucket", "make the bucket")
    refused(lambda: open_s3("s3://no-such-bucket/x").put_if_match("k", b"", '"x"'), "404 NoSuchBucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused(lambda: open_s3(f"s3://{BUCKET}/x").get("k"), "403 SignatureDoesNotMatch", "check the credentials")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused(lambda: open_s3(f"s3://{BUCKET}/x").get("k"), "PartialCredentialsError", "both")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    refused(lambda: open_s3(f"s3://{BUCKET}/x").put_if_absent("k", b""), "NoCredentialsError", "AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ReleaseError, match="ProfileNotFound"):
        open_s3(f"s3://{BUCKET}/x")


def test_writes_tell_caches_what_may_be_kept(s3_environment: Server) -> None:
    store = open_s3(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    said = {}
    for key in ("metadata/timestamp.json", "metadata/2.snapshot.json", "targets/a.qpkg"):
        store.put_if_absent(key, b"1")
        said[key] = store.client.head_object(Bucket=BUCKET, Key=store.prefix + key)["CacheControl"]
    kept = "public, max-age=31536000, immutable"
    assert said == dict(zip(said, ("no-cache", kept, kept), strict=True))


def test_objects_that_another_tool_put_there_are_read(s3_environment: Server) -> None:
    store = open_s3(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    store.client.put_object(Bucket=BUCKET, Key=f"{store.prefix}k", Body=b"1")
    found = store.get("k")
    assert found is not None
    assert store.put_if_match("k", b"2", found.etag)
    assert bytes_at(store, "k") == b"2"


def test_without_boto3_an_address_names_the_extra_and_a_folder_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from qcore.release.location import open_store

    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "qcore.release.s3", raising=False)
    with pytest.raises(ReleaseError, match=r"boto3 is not installed.*kfp-qcore\[s3\]"):
        open_store("s3://bucket/p")
    assert open_store(tmp_path).put_if_absent("k", b"")
