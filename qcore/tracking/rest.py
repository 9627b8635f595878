"""An MLflow server over REST with urllib: a task logs in a quarter of a second instead of importing mlflow.

Built to be given up on: one time limit per call, one more try where the server did not answer at all or said 5xx, one
budget for everything; what is over the budget fails at once and stays in the journal.

Source: MLflow REST API 2.0; artifacts through the server's proxy (`mlflow-artifacts:`).
"""

import base64
import http.client
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcore.tracking.journal import Dataset, Status, TrackingError
from qcore.tracking.sink import (
    CONTEXT_TAG,
    EXPERIMENT_TAGS,
    FAMILY_NOTE,
    MAX_DIGEST,
    Batch,
    ModelVersion,
    NewVersion,
    RefusedError,
    RunFacts,
)

CALL_TIMEOUT_S = 4.0

TRIES = 2
PAUSE_S = 0.2
MAX_ANSWER_BYTES = 1 << 24
"""An answer without end would fill the memory before its time is over."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class RestSink:
    """An MLflow tracking server at an http or https address."""

    def __init__(
        self, uri: str, env: Mapping[str, str], *, budget_s: float, first_answer_s: float = CALL_TIMEOUT_S
    ) -> None:
        """Prepare to talk to `uri`; nothing is sent yet.

        Args:
            uri: `http://` or `https://` address of the server.
            env: where the credentials that MLflow's own client knows are looked up.
            budget_s: seconds that all calls together may take.
            first_answer_s: seconds that the first call may take: until it answers, the server may be dead.

        Raises:
            TrackingError: `uri` has another scheme.
        """
        scheme = urllib.parse.urlsplit(uri).scheme
        if scheme not in ("http", "https"):
            raise TrackingError(f"tracking URI {uri!r}: scheme must be http or https here; check MLFLOW_TRACKING_URI")
        self.uri = uri.rstrip("/")
        self._headers = headers_from_env(env)
        self._budget_s = budget_s
        self._call_s = first_answer_s
        ca_file = env.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        self._tls = ssl.create_default_context(cafile=ca_file) if scheme == "https" else None

    def experiment(self, name: str) -> str:
        """Return the id of the experiment `name`, creating it where it is absent."""
        query = urllib.parse.urlencode({"experiment_name": name})
        found = self._call("GET", f"experiments/get-by-name?{query}", missing_ok=True)
        if not found:
            body = {"name": name, "tags": _entries(EXPERIMENT_TAGS)}
            created = self._call("POST", "experiments/create", body, exists_ok=True)
            if created:
                return self._text(created, "experiment_id")
            found = self._call("GET", f"experiments/get-by-name?{query}")
        return self._text(found, "experiment", "experiment_id")

    def find_run(self, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        """Return the oldest run that carries all `tags`, or None."""
        body = {
            "experiment_ids": [experiment_id],
            "filter": tag_filter(tags),
            "max_results": 1,
            "order_by": ["attributes.start_time ASC"],
        }
        runs = self._rows(self._call("POST", "runs/search", body), "runs")
        return self._text(runs[0], "info", "run_id") if runs else None

    def create_run(self, experiment_id: str, *, name: str, tags: Mapping[str, str], start_ms: int) -> str:
        """Return the id of a new run."""
        body = {
            "experiment_id": experiment_id,
            "run_name": name,
            "start_time": start_ms,
            "tags": _entries(tags),
        }
        return self._text(self._call("POST", "runs/create", body), "run", "info", "run_id")

    def run_facts(self, run_id: str) -> RunFacts:
        """Return what a run already has."""
        run = self._call("GET", f"runs/get?{urllib.parse.urlencode({'run_id': run_id})}")
        data = run.get("run", {}).get("data", {}) if isinstance(run.get("run"), dict) else {}
        return RunFacts(
            experiment_id=self._text(run, "run", "info", "experiment_id"),
            tags=self._pairs(data, "tags"),
            params=self._pairs(data, "params"),
            artifact_uri=self._text(run, "run", "info", "artifact_uri"),
        )

    def log(self, run_id: str, batch: Batch) -> None:
        """Log one chunk of a batch."""
        body = {
            "run_id": run_id,
            "params": _entries(batch.params),
            "tags": _entries(batch.tags),
            "metrics": [
                {"key": m.key, "value": m.value, "timestamp": m.time_ms, "step": m.step} for m in batch.metrics
            ],
        }
        self._call("POST", "runs/log-batch", body)

    def log_dataset(self, run_id: str, dataset: Dataset) -> None:
        """Say that a run used these samples."""
        facts = {
            "name": dataset.name,
            "digest": dataset.digest[:MAX_DIGEST],
            "source_type": "qcore",
            "source": json.dumps({"uri": dataset.source, "sha256": dataset.digest}),
        }
        used = {"tags": _entries({CONTEXT_TAG: dataset.context}), "dataset": facts}
        self._call("POST", "runs/log-inputs", {"run_id": run_id, "datasets": [used]})

    def versions_of(self, run_id: str) -> Sequence[ModelVersion]:
        """Return the versions of registered models that came out of a run."""
        query = urllib.parse.urlencode({"filter": f"run_id = '{run_id}'", "max_results": 100})
        found = self._rows(self._call("GET", f"model-versions/search?{query}"), "model_versions")
        return [self._version(v) for v in found]

    def create_version(self, new: NewVersion) -> str:
        """Return the number of a new version; the registered model is created where it is absent."""
        self._call("POST", "registered-models/create", {"name": new.family, "description": FAMILY_NOTE}, exists_ok=True)
        body = {
            "name": new.family,
            "source": new.source,
            "run_id": new.run_id,
            "description": new.description,
            "tags": _entries(new.tags),
        }
        return self._text(self._call("POST", "model-versions/create", body), "model_version", "version")

    def version(self, family: str, version: str) -> ModelVersion:
        """Return a version with its tags."""
        query = urllib.parse.urlencode({"name": family, "version": version})
        return self._version(self._call("GET", f"model-versions/get?{query}").get("model_version"))

    def tag_version(self, family: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            body = {"name": family, "version": version, "key": key, "value": value}
            self._call("POST", "model-versions/set-tag", body)

    def aliases(self, family: str) -> Mapping[str, str]:
        """Return the versions that aliases of a registered model point at, by alias."""
        found = self._call("GET", f"registered-models/get?{urllib.parse.urlencode({'name': family})}")
        rows = self._rows(found.get("registered_model"), "aliases")
        return {self._text(r, "alias"): self._text(r, "version") for r in rows}

    def set_alias(self, family: str, alias: str, version: str) -> None:
        """Point an alias at a version."""
        body = {"name": family, "alias": alias, "version": version}
        self._call("POST", "registered-models/alias", body)

    def upload(self, run_id: str, path: Path, name: str) -> None:
        """Store the file `path` as `name` among the run's artifacts, through the server.

        Raises:
            TrackingError: the server does not proxy artifacts.
        """
        root = urllib.parse.urlsplit(self.run_facts(run_id).artifact_uri)
        if root.scheme != "mlflow-artifacts":
            raise TrackingError(
                f"artifacts of run {run_id} are at {root.scheme}:, not served by {self.uri}; "
                "start the server with --serve-artifacts, or replay the journal where mlflow is installed"
            )
        target = urllib.parse.quote(f"{root.path.lstrip('/')}/{name}")
        self._send(
            "PUT",
            f"{self.uri}/api/2.0/mlflow-artifacts/artifacts/{target}",
            path.read_bytes(),
            "application/octet-stream",
        )

    def finish(self, run_id: str, status: Status, end_ms: int) -> None:
        """Set the status and the end time of a run."""
        self._call("POST", "runs/update", {"run_id": run_id, "status": status, "end_time": end_ms})

    def _version(self, value: object) -> ModelVersion:
        return ModelVersion(
            family=self._text(value, "name"), version=self._text(value, "version"), tags=self._pairs(value, "tags")
        )

    def _text(self, value: object, *keys: str) -> str:
        """Return what lies below `keys`, as text: a proxy or a login page answers with other things."""
        found = value
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, str | int):
            raise TrackingError(f"{self.uri}: an answer has no {'.'.join(keys)}; is this an MLflow server?")
        return str(found)

    def _rows(self, value: object, key: str) -> list[Any]:
        found = value.get(key, []) if isinstance(value, dict) else None
        if not isinstance(found, list):
            raise TrackingError(f"{self.uri}: an answer has no list {key}; is this an MLflow server?")
        return found

    def _pairs(self, value: object, key: str) -> dict[str, str]:
        return {self._text(r, "key"): self._text(r, "value") for r in self._rows(value, key)}

    def _call(
        self, method: str, path: str, body: object = None, *, missing_ok: bool = False, exists_ok: bool = False
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.uri}/api/2.0/mlflow/{path}"
        try:
            answer = self._send(method, url, data, "application/json")
        except RefusedError as e:
            allowed = {"RESOURCE_DOES_NOT_EXIST": missing_ok, "RESOURCE_ALREADY_EXISTS": exists_ok}
            if allowed.get(e.code, False):
                return {}
            raise
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError) as e:
            raise TrackingError(f"{url}: answered {answer[:40]!r}, which is not JSON; is this an MLflow server?") from e
        if not isinstance(value, dict):
            raise TrackingError(f"{url}: answered {type(value).__name__}, not a JSON object; is this an MLflow server?")
        return value

    def _send(self, method: str, url: str, data: bytes | None, content_type: str) -> bytes:
        headers = {**self._headers, "Content-Type": content_type}
        request = urllib.request.Request(url, data=data, method=method, headers=headers)  # noqa: S310 - scheme is checked
        for attempt in range(1, TRIES + 1):
            if self._budget_s <= 0:
                raise TrackingError(f"{self.uri}: too slow, the time budget is spent; the rest stays in the journal")
            timeout, started = min(self._call_s, self._budget_s), time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=timeout, context=self._tls) as r:  # noqa: S310
                    body = _read(r, started + timeout)
                self._call_s = CALL_TIMEOUT_S
                return body
            except urllib.error.HTTPError as e:
                if e.code < 500 or attempt == TRIES:
                    raise _refused(self.uri, e) from e
            except TimeoutError as e:
                raise TrackingError(f"{self.uri}: no answer within {timeout:.0f} s; check MLFLOW_TRACKING_URI") from e
            except (OSError, http.client.HTTPException) as e:
                if attempt == TRIES or isinstance(getattr(e, "reason", None), TimeoutError):
                    raise TrackingError(f"{self.uri}: {_reason(e)}; check MLFLOW_TRACKING_URI") from e
            finally:
                self._budget_s -= time.monotonic() - started
            time.sleep(PAUSE_S)
        raise AssertionError("unreachable: the last try returns or raises")


def _refused(uri: str, error: urllib.error.HTTPError) -> RefusedError:
    try:
        text = error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = {}
    detail = value if isinstance(value, dict) else {}
    words = str(detail.get("message") or text or error.reason).strip().splitlines() or ["no reason given"]
    hint = "; add its host to the server's --allowed-hosts" if "Host header" in words[0] else ""
    return RefusedError(f"{uri}: HTTP {error.code}: {words[0][:160]}{hint}", str(detail.get("error_code", "")))


def _entries(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": k, "value": v} for k, v in values.items()]


def _read(answer: http.client.HTTPResponse, until: float) -> bytes:
    """Return the body; a socket's time limit restarts at every byte, so a server that drips is cut off here.

    Raises:
        TimeoutError: it is not whole at the time `until`.
        OSError: it is longer than any answer of MLflow's.
    """
    parts, left = [], MAX_ANSWER_BYTES
    while part := answer.read1(1 << 16):
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise OSError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > until:
            raise TimeoutError("the answer drips")
    return b"".join(parts)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"


def tag_filter(tags: Mapping[str, str]) -> str:
    """Return the MLflow search filter for runs that carry all `tags`.

    Raises:
        TrackingError: a value holds a quote or a backslash, which the filter language cannot express.
    """
    for key, value in tags.items():
        if set(value) & set("'\"\\`"):
            raise TrackingError(f"tag {key}: {value!r} holds a quote; allowed are letters, digits and -._ ; rename it")
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())


def headers_from_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return the headers for the credentials that MLflow's own client takes from `env`.

    A token wins over user and password; `MLFLOW_TRACKING_AUTH=kubernetes` (or `kubernetes-namespaced`) reads the
    service account of the pod.
    """
    headers: dict[str, str] = {}
    if workspace := env.get("MLFLOW_WORKSPACE"):
        headers["X-MLFLOW-WORKSPACE"] = workspace
    auth = env.get("MLFLOW_TRACKING_AUTH", "")
    if token := env.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    elif user := env.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{env.get('MLFLOW_TRACKING_PASSWORD', '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    elif auth.startswith("kubernetes") and (SERVICE_ACCOUNT / "token").is_file():
        headers["Authorization"] = f"Bearer {(SERVICE_ACCOUNT / 'token').read_text().strip()}"
        if auth == "kubernetes-namespaced":
            headers.setdefault("X-MLFLOW-WORKSPACE", (SERVICE_ACCOUNT / "namespace").read_text().strip())
    return headers
