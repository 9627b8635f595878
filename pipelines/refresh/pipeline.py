"""A repository kept fresh: one task, to be run every four to six hours by a recurring run.

Timestamps count for two days, so a missed run or two is no harm, and `qcore repo status` warns long before devices do.
"""

from kfp import dsl, kubernetes

from qcore.components.refresh_repository import refresh_repository

KEYS = "/etc/qcore/keys"
REPOSITORY = "/var/lib/qcore/repository"
ONLINE_KEYS_VOLUME, REPOSITORY_VOLUME = "qcore-online-keys", "qcore-repository"
S3_ENV = {
    "endpoint": "AWS_ENDPOINT_URL_S3",
    "region": "AWS_DEFAULT_REGION",
    "access-key-id": "AWS_ACCESS_KEY_ID",
    "secret-access-key": "AWS_SECRET_ACCESS_KEY",
}
S3_ENV_SOURCE = "qcore-s3"
RETRIES = 3


@dsl.pipeline(name="refresh", description="Sign again what nears its expiry in the update repository.")  # type: ignore[untyped-decorator]
def refresh(repository: str = REPOSITORY, keys: str = KEYS) -> None:
    """Run the one task; a cached answer would be no signature."""
    task = refresh_repository(repository=repository, keys=keys).set_caching_options(False)
    task.set_retry(num_retries=RETRIES)
    kubernetes.use_secret_as_volume(task, ONLINE_KEYS_VOLUME, mount_path=KEYS)
    kubernetes.use_secret_as_env(task, S3_ENV_SOURCE, S3_ENV, optional=True)
    kubernetes.mount_pvc(task, REPOSITORY_VOLUME, mount_path=REPOSITORY)
