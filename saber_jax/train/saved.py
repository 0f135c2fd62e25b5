"""Step folders of a checkpoint: which are complete, and whether they are undamaged.

    checkpoints/40/           params, opt_state, meta: items that Orbax writes
    checkpoints/40/digests/   name of every array -> dtype, shape and digest (train/digests.py),
                              and checksums of `meta` and of all this
    checkpoints/60.damaged/   a damaged step, which is not used any more

A folder is complete if Orbax finished it and no item is missing. Whether its bytes have changed is
found by comparing digests when its arrays are read. A killed save leaves STEP.orbax-checkpoint-tmp
on a disk, and in a bucket STEP without its commit_success.txt.
"""

import contextlib
import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array

from saber_jax.runs import buckets, checksums, console, files
from saber_jax.train import digests

DIGESTS = "digests"
META = "meta"
"""The entry of `digests/` with the checksum of `meta`."""
MARKS = {
    **dict.fromkeys(("params", "opt_state"), "_METADATA"),
    **dict.fromkeys(("meta", DIGESTS), "metadata"),
}
"""A file that exists in every complete item of this name."""
PARTIAL = ".orbax-checkpoint-tmp"
"""In the name of a folder that Orbax writes to before it renames it."""
NAMED = 3
"""Number of damaged arrays that a message names; the others are counted."""

OUTAGES = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", *map(os.strerror, OUTAGES))
"""Texts of errors of the storage or the machine, which say nothing about what is stored."""
PAUSES = (1, 4, 16)
"""Seconds between attempts to read."""


class DamagedError(ValueError):
    """A stored step differs from what was saved. The message names the folder and the fault."""


class UnreachableError(OSError):
    """A stored step could not be read, which says nothing about its contents."""


def steps(workdir: str | Path) -> list[Path]:
    """Step folders, oldest first, including incomplete ones."""
    found = [p for p in files.listed(Path(workdir) / "checkpoints") if p.name.isdigit()]
    return sorted((p.absolute() for p in found), key=lambda p: int(p.name))


def problem(step: Path, items: tuple[str, ...] = ("params", DIGESTS)) -> str | None:
    """Why `step` is incomplete; None if it is complete."""
    missing = [item for item in items if not files.exists(step / item / MARKS[item])]
    # In a bucket, a step is not committed by a rename.
    if buckets.mounted(step):
        parts = [step / item for item in items]
        missing += [str((p / buckets.COMMITTED).relative_to(step)) for p in parts if _open(p)]
    return f"{' and '.join(missing)} missing" if missing else None


def _open(item: Path) -> bool:
    """Whether an item in a bucket is not committed."""
    return files.exists(item) and not files.exists(item / buckets.COMMITTED)


def finished_steps(workdir: str | Path) -> list[Path]:
    """Step folders, oldest first, without those that are being saved or whose save was killed."""
    return [step for step in steps(workdir) if not unfinished(step)]


def newest(workdir: str | Path) -> Path:
    """The newest finished step, for commands that only read.

    Raises FileNotFoundError if there is none, DamagedError if it is incomplete.
    """
    found = finished_steps(workdir)
    if not found:
        raise FileNotFoundError(f"{workdir} has no finished checkpoint yet; train it first.")
    if why := problem(found[-1]):
        raise DamagedError(f"{found[-1]} is damaged: {why}. {advice(found[-1])}")
    return found[-1]


def unfinished(step: Path) -> bool:
    """Whether `step` is in a bucket and is being saved, or its save was killed."""
    if not buckets.mounted(step) or files.exists(step / buckets.COMMITTED):
        return False
    # A step of weights only (checkpoint.save_params) has commits of its items alone.
    training = any(files.exists(step / item) for item in ("opt_state", "meta"))
    return training or not files.exists(step / "params" / buckets.COMMITTED)


def remove_unfinished(workdir: Path) -> None:
    """Removes what killed saves left, which would fill the disk. Nobody else may save there."""
    for folder in files.listed(workdir / "checkpoints"):
        if PARTIAL in folder.name or (folder.name.isdigit() and unfinished(folder)):
            files.remove_folder(folder, ignore_errors=True)


def advice(step: Path) -> str:
    """Advice about a damaged step for commands that only read."""
    others = [other.name for other in steps(step.parent.parent) if int(other.name) < int(step.name)]
    if not others:
        return "It is the only one: make it again, or copy it again from where it came from."
    return (
        f"Give the training command again, which sets it aside and goes on from step {others[-1]}, "
        f"or rename it to {step.name}.damaged to use step {others[-1]} as it is."
    )


def set_aside(step: Path) -> Path:
    """Renames a damaged step so that it is kept but not used. Returns its new path."""
    place, count = step.with_name(f"{step.name}.damaged"), 1
    while files.exists(place):
        count += 1
        place = step.with_name(f"{step.name}.damaged-{count}")
    return files.move(step, place)


def described(arrays: Mapping[str, Array]) -> dict[str, list]:
    """The contents of `digests/` for these arrays. Every process must call it."""
    found = digests.of_arrays(arrays)
    return {name: entry(leaf, found[name]) for name, leaf in arrays.items()}


def entry(leaf: Any, digest: int) -> list:
    """The entry of one array; `leaf` needs a dtype and a shape."""
    return [str(leaf.dtype), list(leaf.shape), digest]


def read_json(step: Path, item: str) -> dict[str, Any]:
    """Reads a JSON item that Orbax stored. Raises DamagedError if it is not valid JSON."""
    try:
        value = json.loads(files.read_bytes(step / item / "metadata"))
    except FileNotFoundError:
        raise DamagedError(f"{step} is damaged: {item} missing.") from None
    except ValueError as error:  # Neither JSON nor text.
        raise DamagedError(f"{step} is damaged: {item} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{step} is damaged: {item} is no JSON object.")
    return value


def read_meta(step: Path) -> dict[str, Any]:
    """The `meta` of a step. Raises DamagedError if it was changed or damaged."""
    meta = read_json(step, "meta")
    if checksums.of_json(meta) != _described(step).get(META):
        raise DamagedError(f"{step} is damaged: meta is not what was saved.")
    return meta


def digests_of(step: Path, item: str) -> dict[str, list]:
    """name -> [dtype, shape, digest] of the arrays of one item, as they were saved."""
    return {name: e for name, e in _entries(step).items() if name.startswith(f"{item}/")}


def check_shapes(step: Path, arrays: Mapping[str, Any]) -> None:
    """Raises ValueError if the arrays of `step` have other names or shapes."""
    wanted = {n: tuple(e[:2]) for n, e in _entries(step).items()}
    ours = {n: (str(leaf.dtype), list(leaf.shape)) for n, leaf in arrays.items()}
    differ = sorted(n for n in wanted.keys() | ours.keys() if wanted.get(n) != ours.get(n))
    if differ:
        raise ValueError(
            f"{step} holds another network or optimizer: {differ[0]} is {wanted.get(differ[0])} "
            f"there and {ours.get(differ[0])} here, and {len(differ) - 1} more differ. Give the "
            "new run another --config.workdir, or go back to the code and settings of the old one."
        )


def check(step: Path, arrays: Mapping[str, Array], *, partly: bool = False) -> None:
    """Raises DamagedError naming those of `arrays` that differ from what was saved in `step`, and,
    unless `partly`, saved arrays that are missing."""
    wanted = _entries(step)
    found = described(arrays)
    differ = [n for n in found if found[n] != wanted.get(n)]
    report(step, differ + ([] if partly else sorted(wanted.keys() - found.keys())))


def check_one(step: Path, name: str, leaf: Any, digest: int) -> None:
    """Raises DamagedError if `digest` differs from that of the array that was saved as `name`."""
    if _entries(step).get(name) != entry(leaf, digest):
        report(step, [name])


def report(step: Path, differ: list[str]) -> None:
    """Raises DamagedError if any array differs."""
    if differ:
        others = f" and {len(differ) - NAMED} others" if len(differ) > NAMED else ""
        raise DamagedError(
            f"{step} is damaged: {', '.join(differ[:NAMED])}{others} "
            f"{'is' if len(differ) == 1 else 'are'} not what was saved."
        )


@contextlib.contextmanager
def readable(step: Path) -> Iterator[None]:
    """Converts exceptions of Orbax and TensorStore to DamagedError with advice, or to
    UnreachableError."""
    console.quiet_orbax()
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error} {advice(step)}") from error
    except Exception as error:
        raise DamagedError(f"{damage(step, error)} {advice(step)}") from error


def reading(read: Callable[[], Any]) -> Any:
    """`read()`, retried a few times if storage is unavailable. Only with a single process: several
    would get out of step inside Orbax."""
    for pause in PAUSES if jax.process_count() == 1 else ():
        try:
            return read()
        except Exception as error:
            if not is_outage(error):
                raise
            print(f"storage: {brief(error)}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)
    return read()


def damage(step: Path, error: BaseException) -> str:
    """A message about the damage of a step.

    Raises UnreachableError if storage failed, and `error` again if it is about this machine.
    For damaged files Orbax and TensorStore raise exceptions of many types, even AttributeError.
    """
    mine = isinstance(error, PermissionError | MemoryError | UnreachableError)
    if mine or "RESOURCE_EXHAUSTED" in str(error):
        raise error
    if is_outage(error):
        raise UnreachableError(
            f"{step} could not be read: {cause(error)}. Nothing says that it is damaged, so it "
            "stays; the same command tries again. If it can never be read, rename it to "
            f"{step.name}.damaged to use the step before."
        ) from error
    return f"{step} is damaged: {brief(error)}."


def is_outage(error: BaseException) -> bool:
    """Whether `error` or one of its causes comes from storage that did not answer or from a limit
    of this machine, so that the same read may succeed later."""
    return any(
        (isinstance(link, OSError) and link.errno in OUTAGES)
        or isinstance(link, TimeoutError | ConnectionError)
        or any(word in str(link) for word in PASSING)
        for link in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what caused it, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def brief(error: BaseException) -> str:
    """The first line of a library's error message, without source locations."""
    text = re.split(r" \[(?:source|tensorstore)|\n", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {text[:300]}".rstrip(".: ")


def cause(error: BaseException) -> str:
    """The operating system's error message if it is among the causes, else the first line."""
    text = ""
    for found in _causes(error):
        if isinstance(found, OSError) and found.strerror:
            return f"{found.strerror} ({found.filename})" if found.filename else found.strerror
        text += str(found)
    known = map(os.strerror, files.DISK_ERRORS)
    return next((reason for reason in known if reason in text), brief(error))


def _described(step: Path) -> dict[str, Any]:
    """The entries of `digests/`. Steps of earlier versions have no checksum."""
    entries = read_json(step, DIGESTS)
    if entries.pop(checksums.CHECKSUM, None) not in (None, checksums.of_json(entries)):
        raise DamagedError(f"{step} is damaged: {DIGESTS} is not what was saved.")
    return entries


def _entries(step: Path) -> dict[str, list]:
    entries = {n: e for n, e in _described(step).items() if n != META}
    if broken := [n for n, e in entries.items() if not isinstance(e, list) or len(e) != 3]:
        raise DamagedError(f"{step} is damaged: {DIGESTS} says nothing of {broken[0]}.")
    return entries


def write_digests(step: Path, entries: Mapping[str, list]) -> None:
    """Writes the digests of a step with weights only. Every process must call it."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        args = ocp.args.JsonSave(checksums.sealed(entries))
        checkpointer.save(buckets.native(step / DIGESTS), args=args)


def named(tree: Any, prefix: str) -> dict[str, Any]:
    """{"opt_state/1/0/mu/text/embed": ...}: the leaves of any pytree, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in leaves
    }
