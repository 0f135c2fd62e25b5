"""Manifests: the inputs that a folder's results were computed from.

A folder that a job can resume contains a manifest, a JSON file of the inputs that its results
depend on. A job with other inputs is refused with a list of the differences, so that a folder never
mixes two models, corpora or configs.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saber_jax.runs.files import exists, make_folder, read_edges, read_json, sizes, write_json
from saber_jax.tree import flatten

EDGE_BYTES = 1 << 20


class OtherInputsError(ValueError):
    """The results in a folder were computed from other inputs."""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """["data.length: 4096 there, 2048 here", ...], sorted; nested dicts have dotted names."""
    old, new = flatten(there, "."), flatten(here, ".")
    nothing = "nothing"
    return [
        f"{name}: {old.get(name, nothing)} there, {new.get(name, nothing)} here"
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or old[name] != new[name]
    ]


def check(there: Mapping[str, Any], here: Mapping[str, Any], *, what: str, remedy: str) -> None:
    """Raises OtherInputsError "WHAT (what differs). REMEDY" unless both are equal."""
    if differ := differences(there, here):
        raise OtherInputsError(f"{what} ({'; '.join(differ)}). {remedy}")


def claim(path: str | os.PathLike, inputs: Mapping[str, Any], *, what: str, remedy: str) -> None:
    """Writes the manifest `path`, or checks that it was written from the same `inputs`.

    `inputs` are JSON values. Raises OtherInputsError as `check` does, ValueError if the file is
    damaged.
    """
    path = Path(path)
    if exists(path):
        check(read_json(path), inputs, what=what, remedy=remedy)
        return
    make_folder(path.parent)
    write_json(path, inputs)


def digest(inputs: Any) -> str:
    """Sixteen hex digits that change with any part of this JSON value."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(folder: str | os.PathLike, *patterns: str) -> str:
    """A short hash of the files below `folder` that match any of the glob `patterns`.

    Covers names, sizes and the first and last MiB of each, so it takes seconds for any model.
    Raises FileNotFoundError when nothing matches.
    """
    folder = Path(folder)
    found: dict[Path, int] = {}
    for pattern in patterns:
        found |= sizes(folder, pattern)
    if not found:
        raise FileNotFoundError(f"{folder} holds no {' or '.join(patterns)}. Check the path.")
    digest = hashlib.sha256()
    for path, size in sorted(found.items()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        digest.update(read_edges(path, size, EDGE_BYTES))
    return digest.hexdigest()[:16]
