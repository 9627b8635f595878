"""A database and a real server, for every test that replays."""

from collections.abc import Iterator

import pytest
from mlflow_server import mlflow_server


@pytest.fixture(scope="session", autouse=True)
def quick_and_quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        yield


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('a database')}/new/mlflow.db"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running.uri


@pytest.fixture(params=["database", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    value: str = request.getfixturevalue(request.param)
    return value
