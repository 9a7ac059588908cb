"""A real S3 server on loopback behind a proxy that misbehaves on demand and counts what it is asked."""

import http.client
import re
import socket
import struct
import threading
import uuid
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "127.0.0.1"
KEYS = {"aws_access_key_id": "me", "aws_secret_access_key": "hush", "region_name": "us-east-1"}


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path?query" matches, after `skip` that pass.

    status: answered with HTTP `value` and S3's error `code`; reset: connection reset before an answer; cut: connection
    closed in the middle of the answer, or of the upload; stall: half of the answer, the rest after `value` seconds;
    delay: passed on after `value` seconds.
    """

    kind: str
    match: str
    times: int = 1
    skip: int = 0
    value: float = 503
    code: str = "SlowDown"
    met: int = 0

    @property
    def used(self) -> int:
        return min(max(0, self.met - self.skip), self.times)


class FaultyS3:
    """A bucket of an S3 server, reached through a proxy with `faults`; `requests` are "METHOD /path?query", in order, `sent`
    is the bytes of all answers."""

    def __init__(self, server_port: int):
        import boto3
        from botocore.config import Config

        self.server_port, self.faults, self.requests = server_port, [], []
        self.sent = 0
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.bucket = f"bucket-{uuid.uuid4().hex[:8]}"
        config = Config(response_checksum_validation="when_required")  # the server's own are wrong for copies of parts
        self.direct = boto3.client("s3", endpoint_url=f"http://{HOST}:{server_port}", config=config, **KEYS)
        self.direct.create_bucket(Bucket=self.bucket)
        self._proxy, self.port = None, 0
        self.up()

    def up(self) -> None:
        """Listen, on the same port as before."""
        self._proxy = _Server((HOST, self.port), _Handler)
        self._proxy.s3, self.port = self, self._proxy.server_address[1]
        threading.Thread(target=self._proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """Be unreachable."""
        self._proxy.shutdown()
        self._proxy.server_close()

    def close(self) -> None:
        self.closed.set()
        self.down()

    def uri(self, prefix: str = "") -> str:
        return f"s3://{self.bucket}/{prefix}?endpoint_override={HOST}%3A{self.port}&scheme=http&region=us-east-1"

    def fail(self, kind: str, match: str, **options) -> Fault:
        fault = Fault(kind, match, **options)
        self.faults.append(fault)
        return fault

    def seen(self, match: str) -> list[str]:
        """Return the requests that match."""
        with self.lock:
            return [request for request in self.requests if re.search(match, request)]

    def put(self, key: str, content: bytes) -> None:
        """Store an object, past the proxy."""
        self.direct.put_object(Bucket=self.bucket, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return self.direct.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def object_keys(self) -> list[str]:
        pages = self.direct.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return sorted(key for key in keys if not key.endswith("/"))  # pyarrow leaves empty folder marks

    def upload(self, folder, prefix: str = "") -> None:
        """Store all files of a local folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/"), path.read_bytes())

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.search(fault.match, request):
                    fault.met += 1
                    if fault.skip < fault.met <= fault.skip + fault.times:
                        return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    s3: FaultyS3

    def handle_error(self, request, client_address) -> None: ...


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None: ...

    def handle_one(self) -> None:
        s3: FaultyS3 = self.server.s3
        fault = s3.fault_for(f"{self.command} {self.path}")
        kind = fault.kind if fault else None
        if kind == "reset" or (kind == "cut" and self.command in ("PUT", "POST")):
            if kind == "cut":
                self.rfile.read(64)
            self._reset()
            return
        body = self._body()
        if kind == "status":
            text = (
                f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>on purpose</Message></Error>".encode()
            )
            self._answer(int(fault.value), [("Content-Type", "application/xml")], text)
            return
        if kind == "delay":
            s3.closed.wait(fault.value)
        upstream = http.client.HTTPConnection(HOST, s3.server_port, timeout=30)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        reply = upstream.getresponse()
        content = reply.read()
        headers = [pair for pair in reply.getheaders() if pair[0].lower() not in ("connection", "transfer-encoding")]
        self._answer(reply.status, headers, content, fault if kind in ("cut", "stall") else None)
        upstream.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

    def _answer(self, status: int, headers, content: bytes, fault: Fault | None = None) -> None:
        length = {name.lower(): value for name, value in headers}.get("content-length", str(len(content)))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.server.s3.lock:
            self.server.s3.sent += len(content)
        half = len(content) // 2 if fault else 0
        self.wfile.write(content[:half])
        if fault and fault.kind == "cut":
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault:
            self.server.s3.closed.wait(fault.value)
        self.wfile.write(content[half:])

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        """Return the request's body as it came, chunk marks included."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while True:
            parts.append(self.rfile.readline())
            size = int(parts[-1].split(b";")[0], 16)
            if size:
                parts.append(self.rfile.read(size + 2))
                continue
            while parts[-1] not in (b"\r\n", b""):
                parts.append(self.rfile.readline())
            return b"".join(parts)
