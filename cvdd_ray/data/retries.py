"""Trying again: an object store or a disk that is busy, full or out of reach for a while is no reason to stop.

pyarrow and boto3 try a single request a few times within seconds. Here a whole operation, one that may be repeated, is tried
until it has failed for `limit_s` seconds; what time does not mend (no access, no such bucket) ends at once.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)

from cvdd_ray.errors import ArtifactError, ConfigError

LIMIT = "CVDD_RAY_S3_RETRY_S"
DEFAULT_LIMIT_S = 300.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
QUIET_S = 10.0  # after this long a warning says that something is tried again

_CREDENTIALS = (
    "its credentials are wrong or have expired",
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), the profile or the role",
)
_REGION = "the request was refused", "check region= in the URI or AWS_REGION, and that credentials have not expired"
_FOR_GOOD = {
    "accessdenied": ("access is denied", "give credentials that may do this (AWS_ACCESS_KEY_ID, a profile, a role)"),
    "nosuchbucket": ("there is no such bucket", "create it or correct the URI"),
    "requesttimetooskewed": ("this machine's clock is wrong", "set it"),
    "nosuchupload": ("its upload was aborted by someone else", "run the same command again"),
    "permanentredirect": _REGION,
    "authorizationheadermalformed": _REGION,
}
_FOR_GOOD |= dict.fromkeys(
    ("invalidaccesskeyid", "signaturedoesnotmatch", "invalidclienttokenid", "invalidtoken", "expiredtoken",
     "unrecognizedclient", "missingauthenticationtoken", "tokenrefreshrequired"), _CREDENTIALS,
)  # fmt: skip
_PASSING = {
    "slowdown": "it is busy (503 SlowDown)",
    "serviceunavailable": "it is not available (503)",
    "internalfailure": "it failed inside (500)",
    "internalerror": "it failed inside (500)",
    "requesttimeout": "it timed out",
    "throttling": "it is busy",
    "requestlimitexceeded": "it is busy",
    "operationaborted": "another operation was in its way",
}
_BAD_TLS = {"1", "3", "60", "77"}  # curl: protocol or URL malformed, certificate not trusted, no certificate store

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fault:
    """What went wrong in words, and what mends it; `advice` is None where time may. `absent`: there is no such file."""

    reason: str
    advice: str | None = None
    absent: bool = False


@dataclass(frozen=True)
class Patience:
    """How long what may be waited for is waited for: the environment variable that says so and its default in seconds, what
    an error means (None: it is not this one's), and what a person can do in the end."""

    variable: str
    default_s: float
    diagnose: Callable[[Exception], Fault | None]
    remedy: str

    def limit_s(self) -> float:
        """Return how many seconds an operation may fail before it is given up.  Raises ConfigError for anything but a
        number."""
        text = os.environ.get(self.variable, str(self.default_s))
        try:
            limit = float(text)
        except ValueError:
            limit = -1.0
        if not 0 <= limit < float("inf"):
            raise ConfigError(f"{self.variable}={text}: give seconds, 0 or more (default {self.default_s:g})")
        return limit


def retried(
    operation: Callable[[], Result], doing: str, where: str, *, patience: Patience | None = None,
    clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
) -> Result:  # fmt: skip
    """Return operation(); while it fails of something that passes, wait (exponentially longer, with jitter) and try again.

    `doing` ("read") and `where` (an address without credentials) are for messages; `patience` is an object store's unless
    given. An absent file (FileNotFoundError) and errors that are not the store's pass through.  Raises ArtifactError when it
    has failed for `limit_s` seconds, or at once when time would not mend it.
    """
    patience = patience or OBJECT_STORE
    limit, started, attempt, warned = patience.limit_s(), clock(), 0, False
    while True:
        attempt += 1
        try:
            return operation()
        except FileNotFoundError:
            raise
        except (OSError, BotoCoreError, ClientError) as error:
            fault = patience.diagnose(error)
            if fault is None:
                raise
        if fault.absent:
            raise FileNotFoundError(where)
        if fault.advice is not None:
            raise ArtifactError(f"{where} cannot be {doing}: {fault.reason}; {fault.advice}")
        tried_s = clock() - started
        if tried_s >= limit:
            raise ArtifactError(
                f"{where} cannot be {doing}: {fault.reason}; tried {attempt} times in {tried_s:.0f} s (limit "
                f"{patience.variable}={limit:g}): {patience.remedy}, then run the same command again, it continues"
            )
        if tried_s > QUIET_S and not warned:
            warned = True
            logging.getLogger(__name__).warning(
                "%s cannot be %s: %s; trying for %g s", where, doing, fault.reason, limit
            )
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt - 1, 16)) * random.uniform(0.5, 1)
        sleep(min(wait_s, limit - tried_s))


def diagnose(error: Exception) -> Fault | None:
    """Return what an error of pyarrow's or boto3's S3 client means, None for other errors."""
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)):
        return Fault("there are no credentials for it", _CREDENTIALS[1])
    if isinstance(error, SSLError) and "certificate" in str(error).lower():
        return Fault("its certificate is not trusted", "check the endpoint, or scheme= in the URI")
    if isinstance(error, BotoCoreError):
        return Fault(_network(str(error)))
    if isinstance(error, ClientError):
        about = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = about.get("Code", "")
        return _by_code("" if str(code) == str(status) else code, int(status), f"{code} {about.get('Message', '')}")
    text = " ".join(str(error).split())
    if re.search(r"Bucket '.*' not found", text):  # pyarrow, when it looks for a bucket's region
        return Fault(*_FOR_GOOD["nosuchbucket"])
    found = re.search(r"AWS Error (\w+)(?: \(HTTP status (-?\d+)\))? during \w+ operation:? ?(.*)", text)
    if not found:
        return None
    code, status, message = found[1], int(found[2] or 0), found[3]
    if code == "NETWORK_CONNECTION":
        curl = re.search(r"curlCode: (\d+), (.*)", message)
        if curl and curl[1] in _BAD_TLS:
            return Fault(_network(curl[2]), "check the endpoint, or scheme= in the URI")
        return Fault(_network(curl[2] if curl else message))
    named = re.search(r"ExceptionName: (\w+)", message)  # codes that the C++ client does not know
    return _by_code(named[1] if named else "" if code == "UNKNOWN" else code, status, f"{code} {message}")


def _by_code(code: str, status: int, text: str) -> Fault:
    known = code.replace("_", "").lower()
    if known in _FOR_GOOD:
        return Fault(*_FOR_GOOD[known])
    if known in _PASSING:
        return Fault(_PASSING[known])
    if status >= 500 or status in (-1, 408, 409, 429):
        return Fault("its answer was cut" if status == -1 else f"it answered HTTP {status}")
    if (
        known in ("nosuchkey", "resourcenotfound") or status == 404
    ):  # the second answers HEAD, sometimes without a status
        return Fault("it is not there", absent=True)
    if status == 403:
        return Fault(*_FOR_GOOD["accessdenied"])
    if not code and status in (301, 400):  # an answer to HEAD has no text
        return Fault(f"{_REGION[0]} (HTTP {status})", _REGION[1])
    return Fault(f"the object store refused ({' '.join(text.split())[:200]})", "check the URI")


def _network(text: str) -> str:
    return f"the connection failed ({' '.join(text.split())[:200].rstrip('. ')})"


OBJECT_STORE = Patience(LIMIT, DEFAULT_LIMIT_S, diagnose, "check endpoint and network")
