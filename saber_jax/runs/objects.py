"""Objects of a bucket, by their paths below the bucket's folder (runs/buckets.py).

    read("/home/me/buckets/runs/7b/done/sft.json")    the object gs://runs/7b/done/sft.json

An object is replaced as a whole, and from then on every reader gets the new one: there is nothing
to rename or to flush. Requests are repeated for about a minute while the bucket is busy. Errors are
OSErrors, as on a disk: FileNotFoundError, FileExistsError, or another one.
"""

import contextlib
import errno
import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saber_jax.runs import buckets

REQUEST_SECONDS = 60
EMULATOR = "STORAGE_EMULATOR_HOST"

_systems: dict[tuple[int, str], Any] = {}


def read(path: Path, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes of an object, or those from `start` to `stop`, counted as in a slice."""
    with _as_on_a_disk(path):
        return _system().cat_file(_name(path), start=start, end=stop)


def write(path: Path, data: bytes, *, new: bool = False) -> None:
    """Writes an object. With `new` it must not exist; otherwise raises FileExistsError."""
    with _as_on_a_disk(path):
        _system().pipe_file(_name(path), data, mode="create" if new else "overwrite")


def upload(path: Path, file: Path) -> None:
    """Writes the contents of a local file of any size."""
    with _as_on_a_disk(path):
        _system().put_file(str(file), _name(path))


def upload_folder(folder: Path, source: Path) -> None:
    """Writes all files of the local folder `source`."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            upload(folder / file.relative_to(source), file)


def exists(path: Path) -> bool:
    """Whether there is an object, or an object below it as in a folder."""
    # gcsfs.exists() would also be False if the bucket cannot be asked.
    try:
        with _as_on_a_disk(path):
            _system().info(_name(path))
    except FileNotFoundError:
        return False
    return True


def names(folder: Path, pattern: str) -> list[str]:
    """Names of the objects and folders directly in `folder` that match; [] if there are none."""
    try:
        with _as_on_a_disk(folder):
            found = _system().ls(_name(folder), detail=False)
    except FileNotFoundError:
        return []
    there = {name.rstrip("/").rpartition("/")[2] for name in found}
    return sorted(name for name in there if fnmatch.fnmatchcase(name, pattern))


def sizes(folder: Path, pattern: str = "**/*") -> dict[str, int]:
    """Name, relative to `folder`, and size of the objects at any depth that match.

    `pattern` is one of pathlib's glob, such as "params/**/*".
    """
    base = _name(folder)
    with _as_on_a_disk(folder):
        found = _system().find(base, detail=True)
    sized = {
        name.removeprefix(f"{base}/"): about["size"]
        for name, about in found.items()
        if name.startswith(f"{base}/")
    }
    wanted = pattern.split("/")
    return {n: size for n, size in sorted(sized.items()) if _matches(n.split("/"), wanted)}


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def remove(path: Path) -> None:
    """Removes an object. Raises FileNotFoundError if there is none."""
    with _as_on_a_disk(path):
        _system().rm_file(_name(path))


def remove_folder(folder: Path) -> None:
    """Removes all objects below `folder`, if there are any."""
    for name in sizes(folder):
        with contextlib.suppress(FileNotFoundError):
            remove(folder / name)


def move(source: Path, target: Path) -> None:
    """Moves an object, or all objects below a folder, one after another."""
    inside = [Path(name) for name in sizes(source)] or [Path()]
    for name in inside:
        with _as_on_a_disk(source / name):
            _system().cp_file(_name(source / name), _name(target / name))
        remove(source / name)


def _name(path: Path) -> str:
    """BUCKET/NAME, as gcsfs names objects."""
    return str(buckets.native(path)).removeprefix("gs://")


def _system() -> Any:
    # Each process has its own, because a forked one must not use its parent's connections.
    emulator = os.environ.get(EMULATOR, "")
    key = (os.getpid(), emulator)
    if key not in _systems:
        import gcsfs  # Imported here: it takes half a second.

        _systems[key] = gcsfs.GCSFileSystem(
            # Otherwise files that other hosts have written since would not be seen.
            use_listings_cache=False,
            requests_timeout=REQUEST_SECONDS,
            skip_instance_cache=True,
            # An emulator knows nobody, and looking for credentials takes minutes.
            token="anon" if emulator else None,
        )
    return _systems[key]


@contextlib.contextmanager
def _as_on_a_disk(path: Path) -> Iterator[None]:
    """Turns errors of the client library into OSErrors that name the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
    except Exception as error:  # aiohttp's, google.auth's, gcsfs' HttpError.
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        named = f"{type(error).__name__}: {reason}".rstrip(": ")
        raise OSError(errno.EIO, named, str(path)) from error
