"""Buckets, which have a folder each, and what a path below such a folder is in the bucket.

Settings, manifests and messages name folders. launch/tpu_run.sh gives every bucket that a setting
names a folder (launch/buckets.sh), and lists them in SABER_MOUNTS, one per line:
/home/me/buckets/runs=gs://runs

The bucket may be mounted there, but a run does not use the mount: in a mounted bucket, renaming a
folder moves one object after another and can be interrupted, and reading a file that is being
replaced fails. Small files are read and written by runs/files.py. Libraries that support buckets
are given the bucket's URL:

    native("/home/me/buckets/runs/7b/sft/checkpoints")  ->  gs://runs/7b/sft/checkpoints

Orbax then writes arrays directly to the bucket and commits a step with a last object,
commit_success.txt, instead of a rename.
"""

import os
from pathlib import Path

from etils import epath

MOUNTS = "SABER_MOUNTS"
COMMITTED = "commit_success.txt"
"""The object that Orbax writes last to commit a folder in a bucket."""

# gcsfs would ask what kind of bucket it is, which needs rights that a run need not have.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def native(path: str | os.PathLike) -> epath.Path:
    """gs://BUCKET/... for a path below a bucket's folder; any other path, absolute, and any URL as
    it is."""
    if os.fspath(path).startswith("gs://"):
        return epath.Path(path)
    absolute = Path(path).absolute()
    for folder, bucket in _mounts():
        if absolute.is_relative_to(folder):
            return epath.Path(bucket) / absolute.relative_to(folder).as_posix()
    return epath.Path(absolute)


def mounted(path: str | os.PathLike) -> bool:
    """Whether `path` lies in a bucket."""
    return any(Path(path).absolute().is_relative_to(folder) for folder, _ in _mounts())


def _mounts() -> list[tuple[Path, str]]:
    lines = os.environ.get(MOUNTS, "").splitlines()
    pairs = [line.rpartition("=") for line in lines if line]
    return [(Path(folder).absolute(), bucket) for folder, _, bucket in pairs]
