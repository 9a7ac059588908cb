"""Links to files of a run in an S3 bucket that work for a while for anyone: presigned GET URLs."""

import fnmatch
import re
from collections.abc import Sequence

from cvdd_ray.data.artifacts import MANIFEST
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_S = 7 * UNITS["d"]  # S3 signs for no longer
SETS = ("synthesize/*.arrow", "relabel/*.arrow")
RESULTS = ("report/*", "best.yaml", "results.parquet")


def seconds(text: str) -> int:
    """Return the seconds of a time such as 90m, 24h or 7d.  Raises ConfigError for another text, or over 7 days."""
    found = re.fullmatch(r"(\d+)([smhd])", text.strip())
    expires_s = int(found[1]) * UNITS[found[2]] if found else 0
    if not 0 < expires_s <= LONGEST_S:
        raise ConfigError(f"--expires {text}: give a number with s, m, h or d, at most 7d, e.g. 24h")
    return expires_s


def shared_links(root: str, files: Sequence[str], expires_s: int) -> dict[str, str]:
    """Return {name: URL} of a run's files by name or pattern; without any: the distilled images and soft labels of finished
    stages, and the report.

    The server signs nothing and is not asked whether the files may be read; a link ends early with temporary credentials.
    Raises ConfigError for a place that is not S3, ArtifactError when there is nothing of that name.
    """
    store = Store(root)
    if store.s3 is None:
        raise ConfigError(f"share: {store.root} is not in an S3 bucket; give the s3:// URI of a run or a sweep")
    names = store.all_names()
    if files:
        chosen = [name for pattern in files for name in fnmatch.filter(names, pattern)]
        wrong = [pattern for pattern in files if not fnmatch.filter(names, pattern)]
    else:
        finished = {name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")}
        sets = [name for pattern in SETS for name in fnmatch.filter(names, pattern)]
        chosen = [name for name in sets if name.rpartition("/")[0] in finished]
        chosen += [name for pattern in RESULTS for name in fnmatch.filter(names, pattern)]
        wrong = [] if chosen else ["distilled images, soft labels or a report"]
    if wrong:
        raise ArtifactError(
            f"{store.display('').rstrip('/')} has no {wrong[0]}; it has {len(names)} files, see `cvdd show`"
        )
    return {name: store.s3.presigned(store.path(name), expires_s) for name in dict.fromkeys(chosen)}
