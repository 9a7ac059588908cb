"""S3 as this package uses it: a URI becomes two clients. pyarrow reads and lists; boto3 uploads, copies and signs, because
pyarrow completes an upload whenever its stream is closed, also after an error.
"""

import functools
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs

from cvdd_ray.data.retries import retried

ATTEMPTS = 3  # of one request by the clients themselves, within seconds
CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0  # without a single byte
PART_BYTES = 16 << 20
"""Parts of what is larger; a file of up to this size is one request."""
COPY_PART_BYTES = 1 << 30  # S3 itself copies these; one request may copy 5 GiB
OPTIONS = ("endpoint_override", "scheme", "region", "anonymous", "force_virtual_addressing")


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and who signs them: what both clients are made of. `key` is (access key, secret key) of the URI,
    None for the standard chain (environment, profile, role)."""

    key: tuple[str, str] | None
    host: str | None
    scheme: str
    region: str | None
    anonymous: bool
    virtual: bool


@dataclass(frozen=True)
class S3:
    """A bucket and a prefix at an endpoint."""

    endpoint: Endpoint
    bucket: str
    prefix: str

    @property
    def filesystem(self) -> fs.S3FileSystem:
        return _filesystem(self.endpoint)

    @property
    def base(self) -> str:
        return f"{self.bucket}/{self.prefix}".rstrip("/")

    def put(self, path: str, stream: BinaryIO, size: int) -> None:
        """Upload `size` bytes of a seekable stream: seen whole by others when it is complete, and else not at all."""
        bucket, _, key = path.partition("/")
        client = _client(self.endpoint)
        stream.seek(0)
        if size <= PART_BYTES:
            client.put_object(Bucket=bucket, Key=key, Body=stream.read())
        else:
            client.upload_fileobj(stream, bucket, key, Config=_transfer(PART_BYTES))

    def copy(self, there: str, here: str) -> None:
        """Copy between two paths of this endpoint without passing through this process."""
        source, target = there.partition("/"), here.partition("/")
        _client(self.endpoint).copy(
            {"Bucket": source[0], "Key": source[2]}, target[0], target[2], Config=_transfer(COPY_PART_BYTES)
        )

    def presigned(self, path: str, expires_s: int) -> str:
        """Return a URL that lets anyone GET the path for so many seconds (at most 7 days)."""
        bucket, _, key = path.partition("/")
        return _client(self.endpoint).generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_s
        )


def parse_s3(uri: str) -> S3:
    """Return the place that `s3://[KEY:SECRET@]bucket/prefix?region=...` names; no request is made except to learn the
    region of a bucket on AWS. An endpoint may also come from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.

    Raises ValueError, without any part of the URI that could be secret.
    """
    try:
        parts = urlsplit(uri, allow_fragments=False)
    except ValueError:  # its text repeats the URI
        raise ValueError("it is not a URI") from None
    login, _, bucket = parts.netloc.rpartition("@")
    if ":" in bucket:
        raise ValueError("a port or an unfinished login is where the bucket should be; write / in a secret key as %2F")
    if not bucket:
        raise ValueError("no bucket")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; known are {', '.join(OPTIONS)}")
    key = tuple(unquote(text) for text in login.partition(":")[::2])
    if login and not all(key):
        raise ValueError("a login needs KEY:SECRET")
    endpoint = _endpoint(options, key if login else None)
    if endpoint.region is None:
        where = f"s3://{bucket}"
        region = retried(lambda: fs.resolve_s3_region(bucket), "found", where)
        endpoint = replace(endpoint, region=region)
    return S3(endpoint, bucket, unquote(parts.path).strip("/"))


def _endpoint(options: Mapping[str, str], key: tuple[str, str] | None) -> Endpoint:
    host = (
        options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    scheme = options.get("scheme", "https")
    if host and "://" in host:
        scheme, _, host = host.partition("://")
    if scheme not in ("http", "https"):
        raise ValueError("scheme must be http or https")
    default = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    flags = []
    for name in ("anonymous", "force_virtual_addressing"):
        if options.get(name, "false").lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false")
        flags.append(options.get(name, "false").lower() == "true")
    return Endpoint(
        key, host.rstrip("/") if host else None, scheme, options.get("region") or (default if host else None), *flags
    )


@functools.lru_cache(maxsize=16)
def _filesystem(endpoint: Endpoint) -> fs.S3FileSystem:
    access_key, secret_key = endpoint.key or (None, None)
    return fs.S3FileSystem(
        access_key=access_key,
        secret_key=secret_key,
        anonymous=endpoint.anonymous,
        region=endpoint.region,
        scheme=endpoint.scheme,
        endpoint_override=endpoint.host,
        force_virtual_addressing=endpoint.virtual,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


_making_clients = threading.Lock()


@functools.lru_cache(maxsize=16)
def _client(endpoint: Endpoint) -> Any:
    import boto3  # slow to import, and most runs are local
    from botocore import UNSIGNED
    from botocore.config import Config

    access_key, secret_key = endpoint.key or (None, None)
    config = Config(
        signature_version=UNSIGNED if endpoint.anonymous else "s3v4",
        s3={"addressing_style": "virtual" if endpoint.virtual else "path" if endpoint.host else "auto"},
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        max_pool_connections=16,
    )
    with _making_clients:  # boto3's sessions are not made for threads
        return boto3.session.Session().client(
            "s3",
            endpoint_url=f"{endpoint.scheme}://{endpoint.host}" if endpoint.host else None,
            region_name=endpoint.region,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=config,
        )


def _transfer(part_bytes: int) -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=part_bytes, multipart_chunksize=part_bytes, max_concurrency=4)
