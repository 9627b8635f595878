"""The main path on Kubeflow Pipelines: a float model in, a signed release out, or a decision that says why not.

Publishing sits behind `dsl.If` on the gate's string, and that is convenience only: `cosign` and `publish` verify the
signed decision again and trust nothing else. Only `gate` and `cosign` mount the gate's key, only `publish` the others.
What a run needs besides its parameters is mounted and named here; a local run ignores it (`pipelines/local.py` sets the
environment itself).
"""

from kfp import dsl, kubernetes

from qcore.components.calibrate import calibrate
from qcore.components.cosign import cosign
from qcore.components.evaluate import evaluate
from qcore.components.gate import gate
from qcore.components.package import package
from qcore.components.parity import parity
from qcore.components.prune import prune
from qcore.components.publish import publish
from qcore.components.quantize import quantize
from qcore.components.review import review

KEYS = "/etc/qcore/keys"
REPOSITORY = "/var/lib/qcore/repository"
GATE_KEY_VOLUME, COSIGN_KEY_VOLUME = "qcore-gate-key", "qcore-cosign-key"
PUBLISHER_KEYS_VOLUME, REPOSITORY_VOLUME = "qcore-publisher-keys", "qcore-repository"
MLFLOW_ENV = {
    "uri": "MLFLOW_TRACKING_URI",
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
}
MLFLOW_ENV_SOURCE = "qcore-mlflow"
S3_ENV = {
    "endpoint": "AWS_ENDPOINT_URL_S3",
    "region": "AWS_DEFAULT_REGION",
    "access-key-id": "AWS_ACCESS_KEY_ID",
    "secret-access-key": "AWS_SECRET_ACCESS_KEY",
}
S3_ENV_SOURCE = "qcore-s3"
"""Where `cosign` and `publish` find the store of an s3:// repository; a pod with a cloud identity needs none of it."""


def tracked(task: dsl.PipelineTask, *, cache: bool = False) -> dsl.PipelineTask:
    """Return `task`, told which run it belongs to; the environment is not part of the cache key."""
    kubernetes.use_field_path_as_env(task, env_name="QCORE_RUN_KEY", field_path="metadata.labels['pipeline/runid']")
    kubernetes.use_secret_as_env(task, MLFLOW_ENV_SOURCE, MLFLOW_ENV, optional=True)
    return task.set_caching_options(cache)


@dsl.pipeline(name="release", description="Compress a float ONNX model, gate it on evidence, publish what passed.")  # type: ignore[untyped-decorator]
def release(
    model_uri: str,
    model_sha256: str,
    data_uri: str,
    data_sha256: str,
    family: str,
    version: str,
    recipe: str = "int8",
    target: str = "x86-avx2",
    sparsity: float = 0.0,
    policy: str = "",
    channel: str = "stable",
    repository: str = REPOSITORY,
    keys: str = KEYS,
    calibration_split: str = "calibration",
    evaluation_split: str = "evaluation",
    champion: str = "",
    parity_samples: int = 64,
) -> None:
    """Compose the steps; every argument is explained at the component that takes it."""
    model = dsl.importer(artifact_uri=model_uri, artifact_class=dsl.Model).set_display_name("import model").output
    data = dsl.importer(artifact_uri=data_uri, artifact_class=dsl.Dataset).set_display_name("import data").output
    measured = {"data": data, "split": evaluation_split}

    pruned = tracked(prune(model=model, sparsity=sparsity, model_sha256=model_sha256), cache=True).outputs["pruned"]
    calibrated = calibrate(model=pruned, data=data, split=calibration_split, data_sha256=data_sha256)
    table = tracked(calibrated, cache=True).outputs["table"]
    quantized = quantize(model=pruned, table=table, recipe=recipe, target=target)
    candidate = tracked(quantized, cache=True).outputs["quantized"]
    digests = {"data_sha256": data_sha256, "baseline_sha256": model_sha256}
    evaluated = tracked(evaluate(candidate=candidate, baseline=model, champion=champion, **measured, **digests))
    kubernetes.mount_pvc(evaluated, REPOSITORY_VOLUME, mount_path=REPOSITORY)
    same = tracked(parity(model=candidate, samples=parity_samples, data_sha256=data_sha256, **measured), cache=True)
    same.after(evaluated)  # beside it on one machine, it would be in the latency
    named = {"family": family, "version": version, "target": target}
    packed = tracked(package(model=candidate, **measured, **named)).outputs["package"]
    judged = {"report": evaluated.outputs["report"], "parity": same.outputs["report"], "package": packed}
    gated = tracked(gate(**judged, key=keys, policy=policy))
    kubernetes.use_secret_as_volume(gated, GATE_KEY_VOLUME, mount_path=KEYS)
    evidence = gated.outputs["evidence"]
    made = {"candidate": candidate, "summary": quantized.outputs["summary"], "table": table}
    tracked(review(**judged, evidence=evidence, data=data, name=recipe, **made))

    with dsl.If(gated.outputs["Output"] == "pass", name="passed"):
        signed = tracked(cosign(package=packed, evidence=evidence, repository=repository, keys=keys))
        kubernetes.use_secret_as_volume(signed, COSIGN_KEY_VOLUME, mount_path=KEYS)
        kubernetes.use_secret_as_env(signed, S3_ENV_SOURCE, S3_ENV, optional=True)
        kubernetes.mount_pvc(signed, REPOSITORY_VOLUME, mount_path=REPOSITORY)
        shipped = {"package": packed, "evidence": evidence, "cosigned": signed.outputs["cosigned"]}
        published = publish(**shipped, repository=repository, keys=keys, channel=channel)
        kubernetes.use_secret_as_volume(tracked(published), PUBLISHER_KEYS_VOLUME, mount_path=KEYS)
        kubernetes.use_secret_as_env(published, S3_ENV_SOURCE, S3_ENV, optional=True)
        kubernetes.mount_pvc(published, REPOSITORY_VOLUME, mount_path=REPOSITORY)
