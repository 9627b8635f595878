"""A real S3 server for the tests: SeaweedFS on free ports of 127.0.0.1, killed at the end, restarted on the same files.

It is a third party's build for tests only (extra `dev`, Linux on x86_64); where it is not installed tests skip and say
so. Several servers may run side by side: nothing is shared between them.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "models"
ANYBODY_READS = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    ],
}
"""Devices read over plain http(s): the repository's safety is in its signatures."""
KEY_ID, SECRET = "test-key-id", "test-secret-of-nobody"
READY_S = 30.0
STARTS = 3
"""How often a server is started on other ports: between our look and its start another process may take one."""


def program(name: str) -> str | None:
    """Return the path of an installed program: beside this interpreter, or on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def free_ports(n: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free, with the port 10000 above each (SeaweedFS takes it for gRPC)."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < n:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            above = held.enter_context(socket.socket())
            try:
                above.bind(("127.0.0.1", port + 10000))
            except (OSError, OverflowError):
                continue
            ports.append(port)
        return ports


def environment(endpoint: str) -> dict[str, str]:
    """Return what boto3 reads: this endpoint and the test's keys, and nothing of the machine's own configuration."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass
class Server:
    """A server process that can be killed and started again on the same ports and files."""

    command: list[str]
    endpoint: str
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start the process and wait until it keeps an object."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **self.env}
            )
        client = self.client()
        until = time.monotonic() + READY_S
        while True:
            try:
                if BUCKET not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
                assert client.get_object(Bucket=BUCKET, Key="ready")["Body"].read() == b"1"
                return
            except (BotoCoreError, ClientError) as e:
                dead = self.process.poll() is not None
                if dead or time.monotonic() > until:
                    raise AssertionError(f"no S3 server ({e}): {self.log.read_text()[-2000:]}") from e
                time.sleep(0.1)

    def client(self) -> Any:
        """Return a boto3 client of this server."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(connect_timeout=1, read_timeout=10, retries={"total_max_attempts": 1}),
        )

    def kill(self) -> None:
        """End the process at once, as `kill -9` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextmanager
def seaweedfs(folder: Path) -> Iterator[Server]:
    """Yield a running SeaweedFS whose files are in `folder`."""
    for start in range(1, STARTS + 1):
        server = _seaweedfs(folder, f"s3-{start}")
        try:
            server.start()
        except AssertionError:
            server.kill()
            if start == STARTS:
                raise
        else:
            break
    try:
        server.client().put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(ANYBODY_READS))
        yield server
    finally:
        server.kill()


def _seaweedfs(folder: Path, name: str) -> Server:
    s3, filer, master, volume, admin = free_ports(5)
    (folder / name).mkdir()
    command = [
        str(program("weed")),
        *("-logtostderr=true", "mini", f"-dir={folder / name}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-bucket={BUCKET}", f"-s3.port={s3}", f"-filer.port={filer}", f"-master.port={master}"),
        *(f"-volume.port={volume}", f"-admin.port={admin}", "-webdav=false", "-admin.ui=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
        *("-master.telemetry=false", "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
    ]
    env = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "HOME": str(folder)}
    return Server(command=command, endpoint=f"http://127.0.0.1:{s3}", log=folder / f"{name}.log", env=env)
