"""Object stores that fail for a while are waited for, others end in one clear line; the bytes are right either way."""

import hashlib
import itertools
import pickle
import threading

import pyarrow as pa
import pytest

from cvdd_ray.data import remote, retries
from cvdd_ray.data import s3 as s3_module
from cvdd_ray.data.remote import Remote, below, without_secrets
from cvdd_ray.data.retries import retried
from cvdd_ray.data.s3 import parse_s3
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError

PART_BYTES = 5 << 20  # the least that S3 takes
SMALL = bytes(range(256)) * 10
LARGE = hashlib.sha256(b"seed").digest() * (2 * PART_BYTES // 32) + b"end"  # three parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(s3_module, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(remote, "PART_BYTES", PART_BYTES)


@pytest.fixture
def store(s3):
    return Store(s3.uri("run"))


def refusal(operation) -> str:
    with pytest.raises(ArtifactError) as error:
        operation()
    assert "\n" not in str(error.value)
    assert "hush" not in str(error.value)
    return str(error.value)


PASSING = [
    {"kind": "status", "value": 503, "code": "SlowDown"},
    {"kind": "status", "value": 500, "code": "InternalError"},
    {"kind": "status", "value": 429, "code": "TooManyRequests"},
    {"kind": "reset"},
    {"kind": "cut"},
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault['kind']}{fault.get('value', '')}")
def test_what_passes_is_tried_again_until_the_bytes_are_right(s3, store, fault):
    s3.put("run/there", SMALL)
    read = s3.fail(match="GET /.*/run/there", times=2, **fault)
    assert store.read("there") == SMALL
    assert read.used == 2
    written = s3.fail(match="PUT /.*/run/a/b", times=2, **fault)
    store.write("a/b", SMALL)
    assert written.used == 2
    assert s3.get("run/a/b") == SMALL
    listed = s3.fail(match="GET /.*list-type=2", times=2, **fault)
    assert store.names("a") == ["a/b"]
    assert listed.used == 2
    removed = s3.fail(match="DELETE /.*/run/a/b", times=2, **{**fault, "kind": "reset"})
    store.delete("a/b")
    assert removed.used == 2
    assert s3.object_keys() == ["run/there"]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault['kind']}{fault.get('value', '')}")
def test_large_files_go_in_parts_and_only_the_lost_part_is_sent_again(s3, monkeypatch, fault):
    monkeypatch.setattr(s3_module, "ATTEMPTS", 3)  # as users have it
    store = Store(s3.uri("run"))
    part = s3.fail(match=r"PUT /.*partNumber=2", **fault)
    store.write("large", LARGE)
    assert part.used == 1
    assert [len(s3.seen(rf"PUT .*partNumber={n}$")) for n in (1, 2, 3)] == [1, 2, 1]
    assert s3.get("run/large") == LARGE
    s3.requests.clear()
    cut = s3.fail(match="GET /.*/run/large", skip=1, **fault)
    assert store.read("large") == LARGE
    assert cut.used == 1
    assert len(s3.seen("GET /.*/run/large")) == 4
    with store.open("large") as file:
        assert file.size() == len(LARGE)
        file.seek(PART_BYTES - 5)
        assert file.read(10) == LARGE[PART_BYTES - 5 : PART_BYTES + 5]


def test_a_broken_upload_is_never_seen_and_the_next_try_is_whole(s3, store):
    """The upload is given up and started anew under another upload id; nothing is seen until then, nothing left over."""
    s3.fail("status", r"PUT /.*partNumber=2")
    seen, real = [], s3.fault_for

    def look(request):
        if request.startswith("POST"):
            seen.append(s3.object_keys())
        return real(request)

    s3.fault_for = look
    with store.writer("large") as stream:
        for start in range(0, len(LARGE), 1 << 20):
            stream.write(LARGE[start : start + (1 << 20)])
    assert stream.sha256() == hashlib.sha256(LARGE).hexdigest()
    assert len(s3.seen(r"POST /.*uploads")) == 2
    assert len(s3.seen(r"DELETE /.*uploadId=")) == 1
    assert seen == [[]] * 3
    assert s3.get("run/large") == LARGE
    assert "Uploads" not in s3.direct.list_multipart_uploads(Bucket=s3.bucket)


def test_a_producer_that_fails_leaves_nothing(s3, store):
    def fail():
        with store.writer("half") as stream:
            stream.write(SMALL)
            raise OSError("no more input")

    with pytest.raises(OSError, match="no more input"):
        fail()
    assert s3.object_keys() == []
    assert s3.seen("PUT|POST") == []


@pytest.mark.parametrize("kind", ["stall", "delay"])
def test_a_server_that_falls_silent_is_left(s3, monkeypatch, kind):
    """Timeouts are those of the clients: 2 s without a byte (curl takes some seconds more to be sure)."""
    monkeypatch.setattr(s3_module, "REQUEST_TIMEOUT_S", 2.0)
    store = Store(s3.uri("run"))
    s3.put("run/a", SMALL * 100)
    silent = s3.fail(kind, "GET /.*/run/a", value=60)
    assert store.read("a") == SMALL * 100
    assert silent.used == 1
    silent = s3.fail("delay", "PUT /.*/run/b", value=60)
    store.write("b", SMALL)
    assert silent.used == 1
    assert s3.get("run/b") == SMALL


def test_an_endpoint_that_is_down_for_a_while_is_waited_for(s3, store, caplog):
    s3.put("run/a", SMALL)
    s3.down()
    timer = threading.Timer(2.0, s3.up)
    timer.start()
    try:
        assert store.read("a") == SMALL
    finally:
        timer.join()


def test_after_the_limit_one_line_says_what_where_how_long_and_what_to_do(s3, monkeypatch):
    monkeypatch.setenv(retries.LIMIT, "1")
    store = Store(s3.uri("run").replace("s3://", "s3://me:hush@"))
    fault = s3.fail("status", ".", times=10**6)
    for doing, operation in {
        "read": lambda: store.read("a"), "written": lambda: store.write("a", b"x"), "listed": lambda: store.names("s"),
        "deleted": lambda: store.delete("a"),
    }.items():  # fmt: skip
        message = refusal(operation)
        assert message.startswith(f"s3://{s3.bucket}/run/{'s' if doing == 'listed' else 'a'} cannot be {doing}: it ")
        assert "503" in message
        assert "times in" in message
        assert "(limit CVDD_RAY_S3_RETRY_S=1)" in message
        assert "run the same command again, it continues" in message
    assert fault.used >= 4 * 2


def test_an_endpoint_where_nothing_listens(s3, monkeypatch):
    monkeypatch.setenv(retries.LIMIT, "0.5")
    store = Store(s3.uri("run"))
    s3.down()
    assert "connect to server); tried" in refusal(lambda: store.read("a"))
    assert "the connection failed (Could not connect to the endpoint" in refusal(lambda: store.write("a", b""))
    s3.up()


FOR_GOOD = [
    (403, "AccessDenied", "access is denied"),
    (403, "InvalidAccessKeyId", "its credentials are wrong"),
    (403, "SignatureDoesNotMatch", "its credentials are wrong"),
    (400, "ExpiredToken", "its credentials are wrong"),
    (403, "RequestTimeTooSkewed", "clock is wrong"),
    (301, "PermanentRedirect", "check region="),
]


@pytest.mark.parametrize(("status", "code", "reason"), FOR_GOOD, ids=lambda value: str(value))
def test_what_time_does_not_mend_ends_at_once(s3, store, status, code, reason):
    s3.put("run/a", SMALL)
    s3.fail("status", "GET|PUT", times=10**6, value=status, code=code)
    for operation in (lambda: store.write("a", b"x"), lambda: store.names("s")):
        s3.requests.clear()
        assert reason in refusal(operation)
        assert len(s3.requests) <= 3  # boto3 looks for the region after a redirect
    message = refusal(lambda: store.read("a"))  # answers to GET and HEAD reach pyarrow without their text
    assert any(text in message for text in (reason, "access is denied", "check region="))


def test_no_such_bucket_is_said_at_once(s3):
    store = Store(s3.uri().replace(s3.bucket, "nowhere"))
    for operation in (lambda: store.write("a", b"x"), lambda: store.write("b", LARGE)):
        s3.requests.clear()
        assert refusal(operation).endswith("there is no such bucket; create it or correct the URI")
        assert len(s3.requests) == 1
    assert not store.exists("a")
    with pytest.raises(ArtifactError, match="nowhere/a is not there"):
        store.read("a")


def test_a_bucket_on_aws_is_asked_for_its_region(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setattr(s3_module.fs, "resolve_s3_region", lambda bucket: {"mine": "eu-north-1"}[bucket])
    assert parse_s3("s3://mine/x").endpoint.region == "eu-north-1"
    assert parse_s3("s3://mine/x?region=us-west-2").endpoint.region == "us-west-2"

    def unknown(bucket):
        raise OSError(f"Bucket '{bucket}' not found")

    monkeypatch.setattr(s3_module.fs, "resolve_s3_region", unknown)
    with pytest.raises(ArtifactError, match="s3://mine cannot be found: there is no such bucket"):
        parse_s3("s3://mine/x")


def test_an_endpoint_may_come_from_the_environment(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    store = Store(f"s3://{s3.bucket}/run")
    store.write("a", SMALL)
    assert store.read("a") == SMALL
    assert parse_s3("s3://b/x?endpoint_override=other").endpoint.host == "other"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://first")
    assert parse_s3("s3://b/x").endpoint == parse_s3("s3://b/x?endpoint_override=https://first").endpoint
    assert parse_s3("s3://b/x?region=eu-north-1").endpoint.region == "eu-north-1"


def test_uris_are_taken_apart():
    place = parse_s3("s3://me:a%2Fb%40c@bucket/some/pre%20fix/?endpoint_override=h%3A9&scheme=http&anonymous=true")
    assert (place.bucket, place.prefix, place.base) == ("bucket", "some/pre fix", "bucket/some/pre fix")
    assert place.endpoint == s3_module.Endpoint(("me", "a/b@c"), "h:9", "http", place.endpoint.region, True, False)
    assert below("s3://b/x/?region=r", "a b/c?d#e%.png") == "s3://b/x/a%20b/c%3Fd%23e%25.png?region=r"
    inside = parse_s3(below("s3://b/x/?region=r&endpoint_override=e", "a b/c?d#e%.png"))
    assert inside.base == "b/x/a b/c?d#e%.png"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://", "no bucket"), ("s3:///x", "no bucket"), ("s3://me:hush@/x", "no bucket"),
        ("s3://bucket/x?nonsense=1", "unknown option nonsense; known are endpoint_override, scheme"),
        ("s3://me:hu/sh@bucket/x", "write / in a secret key as %2F"), ("s3://me@bucket/x", "KEY:SECRET"),
        ("s3://bucket/x?endpoint_override=h&scheme=ftp", "http or https"), ("s3://[bucket/x", "not a URI"),
        ("s3://bucket/x?endpoint_override=h&anonymous=maybe", "true or false"),
    ],
)  # fmt: skip
def test_uris_that_cannot_be_opened_say_why(uri, reason):
    message = refusal(lambda: Store(uri))
    assert reason in message
    assert "storage.out" in message
    assert "hu/sh" not in message


def test_secrets_are_hidden_however_they_are_written():
    assert without_secrets("s3://me:hush@bucket/x?region=r") == "s3://bucket/x"
    assert without_secrets("s3://me:hu/sh@bucket/x") == "s3://bucket/x"
    assert without_secrets("s3://me:hu?sh@bucket/x") == "s3://bucket/x"
    assert without_secrets("s3://bucket/mail@host/x") == "s3://bucket/mail@host/x"


def test_files_of_one_object_store_are_copied_inside_it(s3, store):
    other = Store(s3.uri("other"))
    other.write("a", LARGE)
    s3.requests.clear()
    lost = s3.fail("reset", r"PUT /.*/run/b", times=2)
    store.take(other, "a", "b")
    assert lost.used == 2
    assert s3.get("run/b") == LARGE
    assert not s3.seen("GET /.*/other/a")


def test_files_travel_between_a_disk_and_an_object_store(s3, store, tmp_path):
    local = Store(str(tmp_path / "local"))
    local.write("a", LARGE)
    s3.fail("status", "partNumber=1", times=2)
    store.take(local, "a", "b")
    assert s3.get("run/b") == LARGE
    s3.fail("cut", "GET /.*/run/b", times=2)
    local.take(store, "b", "c")
    assert local.read("c") == LARGE
    with pytest.raises(ArtifactError, match="run/nothing is not there"):
        local.take(store, "nothing", "d")
    assert local.names("d") == []


def test_arrow_reads_in_place(s3, store):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("x", pa.int64())])) as writer:
        for k in range(4):
            writer.write_batch(pa.record_batch([pa.array(range(k, k + 100_000))], names=["x"]))
    store.write("t.arrow", sink.getvalue().to_pybytes())
    reader = pa.ipc.open_file(pickle.loads(pickle.dumps(store)).open("t.arrow"))
    s3.fail("cut", "GET /.*t.arrow", times=2)
    assert reader.get_batch(2).column(0)[0].as_py() == 2
    assert reader.get_batch(3).column(0)[-1].as_py() == 100_002


def test_several_threads_read_one_file(s3, store):
    s3.put("run/large", LARGE)
    file = Remote(s3.uri("run")).open(f"{s3.bucket}/run/large")
    s3.fail("cut", "GET /.*large", times=5, skip=3)
    results: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.update({k: file.read_at(k * 1000, 1000)})) for k in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: LARGE[k * 1000 : k * 1000 + 1000] for k in range(16)}


# ------------------------------------------------------------------------------------------------ the waiting itself


@pytest.mark.parametrize(
    "said",
    [
        "AWS Error NO_SUCH_KEY during GetObject operation: The specified key does not exist.",
        "AWS Error RESOURCE_NOT_FOUND during HeadObject operation: No response body.",
        "AWS Error UNKNOWN (HTTP status 404) during HeadObject operation: No response body.",
    ],
)
def test_an_absent_file_is_known_however_it_is_said(said):
    def read():
        raise OSError(said)

    with pytest.raises(FileNotFoundError, match="s3://bucket/name"):
        retries.retried(read, "read", "s3://bucket/name")


def unreachable():
    raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Could not connect to server")


def test_waits_grow_with_jitter_and_never_pass_the_limit(monkeypatch):
    monkeypatch.setenv(retries.LIMIT, "100")
    now, waits = [0.0], []

    def sleep(wait_s):
        waits.append(wait_s)
        now[0] += wait_s

    with pytest.raises(ArtifactError, match=r"tried 1[0-5] times in 100 s"):
        retried(unreachable, "read", "s3://b/x", clock=lambda: now[0], sleep=sleep)
    assert sum(waits) == pytest.approx(100)
    bounds = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(
        bound / 2 <= wait <= bound for wait, bound in zip(waits[:-1], itertools.chain(bounds, [30] * 9), strict=False)
    )


def test_no_limit_at_all_is_refused(monkeypatch):
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(retries.LIMIT, text)
        with pytest.raises(ConfigError, match="CVDD_RAY_S3_RETRY_S"):
            retried(unreachable, "read", "s3://b/x")


def test_other_errors_pass_through(monkeypatch):
    for error in (OSError("no space left on device"), FileNotFoundError("x"), ValueError("x")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            retried(fail, "read", "s3://b/x", sleep=lambda wait_s: pytest.fail("waited"))


def test_a_long_wait_is_said_once(monkeypatch, caplog):
    now = [0.0]

    def sleep(wait_s):
        now[0] += wait_s

    with pytest.raises(ArtifactError):
        retried(unreachable, "read", "s3://b/x", clock=lambda: now[0], sleep=sleep)
    assert len(caplog.records) == 1
    assert "trying for 300 s" in caplog.text
