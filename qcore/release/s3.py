"""The S3 store: the same four operations on any S3-compatible server, with every doubtful answer resolved or said.

Conditions are the server's (`If-None-Match: *`, `If-Match`); `doctor.py` proves that it keeps them. What this module
adds is what an answer means. A write whose answer was lost is sent again under the same condition, and a refusal is
read back: each write carries a token of its own in the object's metadata, so "my write came through" and "another one
wrote the same bytes" are told apart. Retries are counted here and not by botocore, which would turn its own success
into a refusal. Messages hold addresses, statuses and error codes, never credentials or what the server wrote.

Source: Amazon S3 API reference, PutObject, and user guide, "How to prevent object overwrites with conditional writes":
412 refused, 409 conflict with a concurrent request (send again), 404 no such key under If-Match.
"""

import base64
import hashlib
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from qcore.canonical import sha256_bytes
from qcore.errors import DoubtfulWriteError, ReleaseError
from qcore.release.store import KEY, Object, check_key

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 15.0
"""Longer than servers hold back the losers of a race for one key (SeaweedFS: 3 s)."""
ATTEMPTS = 6
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0
"""Waits between attempts double from the first to the longest and are jittered: at most 6.2 s in all, and 90 s more
where every attempt waits for its answer in vain."""
WRITE_TOKEN, CONTENT_SHA256 = "qcore-write", "qcore-sha256"
"""Metadata of an object: which call wrote it, and the digest of its bytes (noticed: bodies cut on the way)."""

_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9][A-Za-z0-9._-]*)*)/?", re.ASCII)
_LONGEST_PREFIX = 256
_TRANSPORT = (NoConnectionError, HTTPClientError, IncompleteReadError, FlexibleChecksumError)
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted")
_HINTS = {
    "NoSuchBucket": "make the bucket, or correct the address",
    "AccessDenied": "allowed: credentials that may get, put and list here, see docs/stores.md; mend the policy",
    "InvalidAccessKeyId": "check the credentials in the environment or in the AWS configuration",
    "SignatureDoesNotMatch": "check the credentials and the region",
    "AuthorizationHeaderMalformed": "check the region (AWS_DEFAULT_REGION)",
    "PermanentRedirect": "check the region (AWS_DEFAULT_REGION)",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "NotImplemented": "the server has no conditional writes; choose one that `qcore repo doctor` accepts",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
    "PartialCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY both",
}
_AGAIN = "check server and network, then run the same command again: what is there already is recognised"

_T = TypeVar("_T")


def open_s3(url: str, *, read_timeout_s: float = READ_TIMEOUT_S) -> "S3Store":
    """Return the store at `url`, `s3://bucket` or `s3://bucket/prefix`; nothing is sent yet.

    Endpoint, region and credentials are boto3's usual ones (`AWS_ENDPOINT_URL_S3`, `AWS_DEFAULT_REGION`,
    `AWS_PROFILE` ...). Where an endpoint is given, the bucket is in the path and not in the host name.

    Raises:
        ReleaseError: the address is not of that form, or the AWS configuration cannot be used.
    """
    parts = _URL.fullmatch(url)
    if parts is None or ".." in url or len(parts[2]) > _LONGEST_PREFIX:
        shown = repr(url) if not set("@?#") & set(url) and url.isprintable() else "the address"  # it may hold a secret
        raise ReleaseError(
            f"store: {shown} is not s3://bucket/prefix; allowed: a bucket name and parts of A-Za-z0-9._- joined by /, "
            "no '..'; endpoint and credentials go into the environment (AWS_ENDPOINT_URL_S3, AWS_PROFILE ...)"
        )
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout_s,
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",  # ours is a plain header; servers choke on aws-chunked trailers
    )
    try:
        client = boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as e:
        name = type(e).__name__
        hint = _HINTS.get(name, "mend the environment (AWS_...) or ~/.aws/config")
        raise ReleaseError(f"store {url}: the AWS configuration cannot be used: {name}; {hint}") from e
    return S3Store(client=client, bucket=parts[1], prefix=parts[2].strip("/") + "/" if parts[2] else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Store:
    """Objects of `bucket` below `prefix` ("" or ending in "/"), by a boto3 client that does not retry by itself."""

    client: Any
    bucket: str
    prefix: str

    def get(self, key: str) -> Object | None:
        """Return the object, or None if there is none; a body that was cut is read again."""
        found = self._read(check_key(key))
        return None if found is None else found.object

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Return True after `data` was created; False if `key` exists with what another call wrote."""
        return self._put(_Write(key=check_key(key), data=data, etag=None, token=secrets.token_hex(16)))

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Return True after `data` replaced the object of tag `etag`; False, with nothing changed, otherwise.

        Raises:
            DoubtfulWriteError: the answer was lost, and others have replaced the object since.
        """
        return self._put(_Write(key=check_key(key), data=data, etag=etag, token=secrets.token_hex(16)))

    def list(self, prefix: str) -> list[str]:
        """Return the sorted keys that begin with `prefix`; servers sort in different ways, so it is done here."""
        keys: set[str] = set()
        token = None
        while True:
            page: dict[str, Any] = {} if token is None else {"ContinuationToken": token}
            page |= {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
            answer = self._patiently("list", prefix, partial(self.client.list_objects_v2, **page))
            found = [o["Key"].removeprefix(self.prefix) for o in answer.get("Contents", ())]
            more = answer.get("NextContinuationToken") if answer.get("IsTruncated") else None
            if more is not None and (more == token or keys.issuperset(found)):
                raise self._refusal("list", prefix, "a page that leads nowhere", "check the server")
            keys.update(found)
            if more is None:
                return sorted(k for k in keys if KEY.fullmatch(k))
            token = more

    def remove(self, key: str) -> None:
        """Remove the object if it is there; only `qcore repo doctor` does, and only what it wrote."""
        place = {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}
        self._patiently("remove", key, lambda: self.client.delete_object(**place))

    def _put(self, write: "_Write") -> bool:
        request = {"Bucket": self.bucket, "Key": self.prefix + write.key, **write.request()}
        doubtful, observed = False, ""
        for _ in _attempts():
            try:
                self.client.put_object(**request)
                return True
            except ClientError as e:
                status, code = _status(e)
                observed = f"{status} {code}"
                if status == 412 or (status == 404 and code != "NoSuchBucket" and write.etag is not None):
                    outcome = self._read_back(write, doubtful=doubtful)
                    if outcome is not None:
                        return outcome
                elif not (_is_passing(status, code) or code in _CONFLICTS):
                    raise self._refusal("write", write.key, observed, _HINTS.get(code, _AGAIN)) from e
                else:
                    doubtful |= status >= 500 and code != "SlowDown"
            except _TRANSPORT as e:
                observed = type(e).__name__
                doubtful |= not isinstance(e, NoConnectionError)  # nothing was sent
            except BotoCoreError as e:
                raise self._refusal("write", write.key, type(e).__name__, _HINTS.get(type(e).__name__, _AGAIN)) from e
        if doubtful and self._was_written(write, observed):
            return True
        if not observed.startswith("412"):
            raise self._refusal("write", write.key, f"{observed} ({ATTEMPTS} times)", _AGAIN)
        what = "there is no object" if write.etag is None else "the object is as it was read"
        hint = "stale reads, or a server that cannot compare: run `qcore repo doctor`"
        raise self._refusal("write", write.key, f"412 though {what} ({ATTEMPTS} times)", hint)

    def _read_back(self, write: "_Write", *, doubtful: bool) -> bool | None:
        """Return what a refused write came to: done by an earlier attempt, refused, or None: to be sent again."""
        found = self._read(write.key)
        if found is None:
            return None if write.etag is None else False
        if found.token == write.token:
            if found.object.data != write.data:
                raise self._refusal("write", write.key, "other bytes than were sent", "do not use this server")
            return True
        if write.etag is None:
            return False
        if found.object.etag == write.etag:
            return None  # refused though nothing changed: a stale read or a server that cannot compare
        if doubtful:
            raise DoubtfulWriteError(
                f"store {self._url()}: the answer to a write of {write.key} was lost, and the object was replaced "
                "since; whether the write counted is not known; read what is there, and repeat what is missing"
            )
        return False

    def _was_written(self, write: "_Write", observed: str) -> bool:
        """Return whether a write that was never answered is there; the attempts are used up."""
        try:
            return self._read_back(write, doubtful=True) is True
        except DoubtfulWriteError:
            raise
        except ReleaseError as e:
            what = f"{observed} ({ATTEMPTS} times), nor read back: whether it counted is not known"
            raise self._refusal("write", write.key, what, _AGAIN) from e

    def _read(self, key: str) -> "_Found | None":
        place = {"Bucket": self.bucket, "Key": self.prefix + key}

        def once() -> _Found | None:
            try:
                answer = self.client.get_object(**place)
                data = answer["Body"].read()
            except ClientError as e:
                if _status(e)[0] == 404 and _status(e)[1] != "NoSuchBucket":
                    return None
                raise
            if not answer.get("ETag"):  # an empty If-Match would be no condition at all
                raise self._refusal("read", key, "an object without ETag", "do not use this server")
            notes = {k.lower(): v for k, v in answer.get("Metadata", {}).items()}  # some servers change the case
            if notes.get(CONTENT_SHA256, sha256_bytes(data)) != sha256_bytes(data):
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=answer.get("ContentLength", -1))
            return _Found(object=Object(data=data, etag=answer["ETag"]), token=notes.get(WRITE_TOKEN))

        return self._patiently("read", key, once)

    def _patiently(self, verb: str, key: str, call: Callable[[], _T]) -> _T:
        """Return the result of a call that changes nothing (or the same thing twice), repeated while it may pass."""
        observed = ""
        for _ in _attempts():
            try:
                return call()
            except ClientError as e:
                status, code = _status(e)
                observed = f"{status} {code}"
                if not _is_passing(status, code):
                    raise self._refusal(verb, key, observed, _HINTS.get(code, _AGAIN)) from e
            except _TRANSPORT as e:
                observed = type(e).__name__
            except BotoCoreError as e:
                raise self._refusal(verb, key, type(e).__name__, _HINTS.get(type(e).__name__, _AGAIN)) from e
        raise self._refusal(verb, key, f"{observed} ({ATTEMPTS} times)", _AGAIN)

    def _refusal(self, verb: str, key: str, observed: str, hint: str) -> ReleaseError:
        server = urlsplit(str(self.client.meta.endpoint_url))
        at = server.hostname if server.port is None else f"{server.hostname}:{server.port}"
        return ReleaseError(f"store {self._url()}: cannot {verb} {key or 'objects'}: {observed} from {at}; {hint}")

    def _url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Write:
    """One write with its condition (`etag` None: create only) and the token that tells it from all others."""

    key: str
    data: bytes
    etag: str | None
    token: str

    def request(self) -> dict[str, Any]:
        """Return the arguments of `put_object` without the place."""
        digest = hashlib.sha256(self.data)
        mutable = self.key.endswith("timestamp.json")  # the one object that is ever replaced; caches must ask for it
        condition = {"IfNoneMatch": "*"} if self.etag is None else {"IfMatch": self.etag}
        return {
            **condition,
            "Body": self.data,
            "ChecksumSHA256": base64.b64encode(digest.digest()).decode(),
            "CacheControl": "no-cache" if mutable else "public, max-age=31536000, immutable",
            "Metadata": {WRITE_TOKEN: self.token, CONTENT_SHA256: digest.hexdigest()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """An object, and the token of the call that wrote it (None: not written by this module, or not kept)."""

    object: Object
    token: str | None


def _status(error: ClientError) -> tuple[int, str]:
    """Return status and code of an error answer; an answer without a body (HEAD, proxies) has the status as code."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    return status, code if code.isalnum() and code.isascii() else "without a code"


def _is_passing(status: int, code: str) -> bool:
    """Return whether the same request may be answered otherwise a moment later."""
    return status in (429, 500, 502, 503, 504) or code in ("RequestTimeout", "SlowDown")


def _attempts() -> Iterator[int]:
    """Yield the number of each attempt, with a jittered, growing wait before all but the first."""
    wait = random.SystemRandom()
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(wait.uniform(0.5, 1.0) * min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S))
        yield attempt
