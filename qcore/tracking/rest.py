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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from qcore.tracking.journal import Status, TrackingError
from qcore.tracking.sink import EXPERIMENT_TAGS, Batch

CALL_TIMEOUT_S = 4.0
BUDGET_S = 8.0
"""All calls of one sink together; a whole run must not lose more than ten seconds to a sick server."""

TRIES = 2
PAUSE_S = 0.2
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class RestSink:
    """An MLflow tracking server at an http or https address."""

    def __init__(self, uri: str, env: Mapping[str, str], *, budget_s: float = BUDGET_S) -> None:
        """Prepare to talk to `uri`; nothing is sent yet.

        Args:
            uri: `http://` or `https://` address of the server.
            env: where the credentials that MLflow's own client knows are looked up.
            budget_s: seconds that all calls together may take.

        Raises:
            TrackingError: `uri` has another scheme.
        """
        scheme = urllib.parse.urlsplit(uri).scheme
        if scheme not in ("http", "https"):
            raise TrackingError(f"tracking URI {uri!r}: scheme must be http or https here; check MLFLOW_TRACKING_URI")
        self.uri = uri.rstrip("/")
        self._headers = headers_from_env(env)
        self._budget_s = budget_s
        ca_file = env.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        self._tls = ssl.create_default_context(cafile=ca_file) if scheme == "https" else None

    def experiment(self, name: str) -> str:
        """Return the id of the experiment `name`, creating it where it is absent."""
        query = urllib.parse.urlencode({"experiment_name": name})
        found = self._call("GET", f"experiments/get-by-name?{query}", missing_ok=True)
        if not found:
            tags = [{"key": k, "value": v} for k, v in EXPERIMENT_TAGS.items()]
            created = self._call("POST", "experiments/create", {"name": name, "tags": tags}, exists_ok=True)
            if created:
                return str(created["experiment_id"])
            found = self._call("GET", f"experiments/get-by-name?{query}")
        return str(found["experiment"]["experiment_id"])

    def find_run(self, experiment_id: str, tags: Mapping[str, str]) -> str | None:
        """Return the oldest run that carries all `tags`, or None."""
        body = {
            "experiment_ids": [experiment_id],
            "filter": tag_filter(tags),
            "max_results": 1,
            "order_by": ["attributes.start_time ASC"],
        }
        runs = self._call("POST", "runs/search", body).get("runs", [])
        return str(runs[0]["info"]["run_id"]) if runs else None

    def create_run(self, experiment_id: str, *, name: str, tags: Mapping[str, str], start_ms: int) -> str:
        """Return the id of a new run."""
        body = {
            "experiment_id": experiment_id,
            "run_name": name,
            "start_time": start_ms,
            "tags": [{"key": k, "value": v} for k, v in tags.items()],
        }
        return str(self._call("POST", "runs/create", body)["run"]["info"]["run_id"])

    def run_tags(self, run_id: str) -> Mapping[str, str]:
        """Return the tags of a run."""
        return {t["key"]: t["value"] for t in self._run(run_id)["data"].get("tags", [])}

    def log(self, run_id: str, batch: Batch) -> None:
        """Log one chunk of a batch."""
        body = {
            "run_id": run_id,
            "params": [{"key": k, "value": v} for k, v in batch.params.items()],
            "tags": [{"key": k, "value": v} for k, v in batch.tags.items()],
            "metrics": [
                {"key": m.key, "value": m.value, "timestamp": m.time_ms, "step": m.step} for m in batch.metrics
            ],
        }
        self._call("POST", "runs/log-batch", body)

    def upload(self, run_id: str, path: Path, name: str) -> None:
        """Store the file `path` as `name` among the run's artifacts, through the server.

        Raises:
            TrackingError: the server does not proxy artifacts.
        """
        root = urllib.parse.urlsplit(self._run(run_id)["info"]["artifact_uri"])
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

    def _run(self, run_id: str) -> dict[str, Any]:
        run: dict[str, Any] = self._call("GET", f"runs/get?{urllib.parse.urlencode({'run_id': run_id})}")["run"]
        return run

    def _call(
        self, method: str, path: str, body: object = None, *, missing_ok: bool = False, exists_ok: bool = False
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.uri}/api/2.0/mlflow/{path}"
        try:
            answer = self._send(method, url, data, "application/json")
        except _RefusedError as e:
            allowed = {"RESOURCE_DOES_NOT_EXIST": missing_ok, "RESOURCE_ALREADY_EXISTS": exists_ok}
            if allowed.get(e.error_code, False):
                return {}
            raise
        try:
            value = json.loads(answer)
        except ValueError as e:
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
            timeout, started = min(CALL_TIMEOUT_S, self._budget_s), time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=timeout, context=self._tls) as r:  # noqa: S310
                    body: bytes = r.read()
                return body
            except urllib.error.HTTPError as e:
                if e.code < 500 or attempt == TRIES:
                    raise _RefusedError.from_http(self.uri, e) from e
            except TimeoutError as e:
                raise TrackingError(f"{self.uri}: no answer within {timeout:.0f} s; check MLFLOW_TRACKING_URI") from e
            except (OSError, http.client.HTTPException) as e:
                if attempt == TRIES or isinstance(getattr(e, "reason", None), TimeoutError):
                    raise TrackingError(f"{self.uri}: {_reason(e)}; check MLFLOW_TRACKING_URI") from e
            finally:
                self._budget_s -= time.monotonic() - started
            time.sleep(PAUSE_S)
        raise AssertionError("unreachable: the last try returns or raises")


class _RefusedError(TrackingError):
    """The server answered, and said no."""

    error_code: str = ""

    @classmethod
    def from_http(cls, uri: str, error: urllib.error.HTTPError) -> Self:
        text = error.read(2000).decode(errors="replace")
        try:
            value = json.loads(text)
        except ValueError:
            value = {}
        detail = value if isinstance(value, dict) else {}
        said = str(detail.get("message") or text or error.reason).strip().splitlines()[0][:160]
        hint = "; add its host to the server's --allowed-hosts" if "Host header" in said else ""
        refused = cls(f"{uri}: HTTP {error.code}: {said}{hint}")
        refused.error_code = str(detail.get("error_code", ""))
        return refused


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
