"""Finding clips with their annotations and labels, and decoding them one by one.

A clip, its annotation and its labels are matched by name: the path below their folder, without
the suffix. clips/B/001.mp4 has the annotation annotations/B/001.json and the labels of "B/001".
"""

import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.records import containers
from saber_jax.data import annotations, decode, records, texts
from saber_jax.runs.files import parse_json, replacing

REASONS = {
    **decode.REASONS,
    "no_annotation": "the clip has no annotation file of the same name",
    "bad_annotation": "the annotation does not follow the SABER layout",
    "duplicate_id": "another file has the same name",
    "bad_name": "the file's name cannot be stored as text",
}
"""Why a clip can be refused; the key goes into refused.jsonl."""

_CJK = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A clip that did not become a record."""

    file: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """One clip to decode. Everything except its media has been checked.

    `file` is its path below the clips' folder; the decoded media are written to `staged`.
    """

    clip_id: str
    file: str
    split: str
    language: str
    path: Path
    staged: Path
    annotation: Mapping[str, str]
    labels: Mapping[str, str]
    sampling: decode.FrameSampling


def find_videos(directory: Path, what: str = "clips") -> list[Path]:
    """Videos below a directory, sorted. FileNotFoundError if there is no directory or no video."""
    return _sort_files(directory, containers.is_video, what, containers.EXTENSIONS)[0]


def _sort_files(
    directory: Path, fits: Callable[[Path], bool], what: str, kinds: Iterable[str]
) -> tuple[list[Path], list[Path]]:
    """Files below a directory that fit, and all others, both sorted. `kinds` are their suffixes.

    Hidden files are among the others: file managers leave some that look like clips. Raises
    FileNotFoundError if there is no directory or no file that fits.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"The {what} directory {directory} does not exist.")
    taken, others = [], []
    for path in sorted(_files_below(directory, set())):
        hidden = path.name.startswith(".")
        (taken if not hidden and fits(path) else others).append(path)
    if not taken:
        seen = f" It holds {_listed(others)}." if others else ""
        raise FileNotFoundError(f"No {what} ({', '.join(kinds)}) in {directory}.{seen}")
    return taken, others


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _files_below(directory: Path, above: set[str]) -> Iterator[Path]:
    """Follows links to folders, which Path.rglob does not, and stops at cycles."""
    real = os.path.realpath(directory)
    if real in above:
        return
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files_below(path, above | {real})
        elif path.is_file():
            yield path


def _listed(paths: Sequence[Path]) -> str:
    return texts.listed([shown(path.name) for path in paths])


def shown(name: str) -> str:
    """A file name in characters that can be printed and written anywhere."""
    return os.fsencode(name).decode(errors="backslashreplace")


def name_of(path: Path, root: Path) -> str:
    """The name of a clip (see the module docstring), in Unicode NFC on every file system."""
    name = path.relative_to(root).with_suffix("").as_posix()
    return unicodedata.normalize("NFC", name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipInputs:
    """Contents of the folders: clips (file to name), annotations (name to file), labels by name.

    `others` are the paths of all files that are not used, so that they can be reported.
    """

    clips: dict[Path, str]
    annotations: dict[str, Path]
    labels: dict[str, dict[str, str]]
    others: list[str]

    def unused(self) -> dict[str, list[str]]:
        """Files that are neither, annotations and labels that no clip has, and clips that have no
        labels where others have, by kind."""
        names = set(self.clips.values())
        return {
            "files": self.others,
            "annotations": sorted(f"{name}.json" for name in self.annotations if name not in names),
            "labels": sorted(name for name in self.labels if name not in names),
            "unlabelled": sorted(names - self.labels.keys()) if self.labels else [],
        }


def find_inputs(clips: Path, annotated: Path, labels: Path | None) -> ClipInputs:
    """Raises FileNotFoundError for an empty folder and ValueError for wrong labels."""
    videos, other_videos = _sort_files(clips, containers.is_video, "clips", containers.EXTENSIONS)
    found, other_texts = _sort_files(annotated, _is_json, "annotations", (".json",))
    by_name: dict[str, Path] = {}
    for path in found:
        by_name.setdefault(name_of(path, annotated), path)
    # One folder may hold all of it, so what is no clip may be an annotation.
    used = [*videos, *by_name.values(), *([labels] if labels else [])]
    real = {os.path.realpath(path) for path in used}
    others = {path for path in (*other_videos, *other_texts, *found)}
    names = {path: name_of(path, clips) for path in videos}
    return ClipInputs(
        clips=names,
        annotations=by_name,
        labels=_labels_of(labels, clips, names) if labels else {},
        others=sorted(shown(str(p)) for p in others if os.path.realpath(p) not in real),
    )


def _labels_of(path: Path, folder: Path, names: Mapping[Path, str]) -> dict[str, dict[str, str]]:
    """`read_labels`, which must name clips and not their files: clips without their labels would
    all be trained on, test clips included."""
    labels, known = read_labels(path), set(names.values())
    files = {str(file.relative_to(folder)): name for file, name in names.items()}
    files |= {str(file): name for file, name in names.items()} | {name: name for name in known}
    for label in sorted(labels.keys() - known):
        if meant := files.get(label.replace("\\", "/").removeprefix("./")):
            raise ValueError(
                f"{path} has the clip_id {label!r}. A clip_id is the path below {folder} without "
                f"the suffix; write {meant!r}, and the others alike."
            )
    return labels


def read_labels(path: Path, also: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """labels.jsonl as {clip_id: line}; `also` are more keys that it may have.

    Raises ValueError, which names the file and the line that is wrong.
    """
    labels: dict[str, dict[str, str]] = {}
    known = {"clip_id", "split", "language", *records.LABELS, *also}
    for number, line in texts.lines(texts.read(path)):
        try:
            row = _label(line, known)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} {error}.") from error
        if row["clip_id"] in labels:
            raise ValueError(f"{path}, line {number} is the second of {row['clip_id']}.")
        labels[row["clip_id"]] = row
    return labels


def _label(line: str, known: set[str]) -> dict[str, str]:
    """Parses one line. The text of a ValueError continues "labels.jsonl, line 3 ..."."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("clip_id"), str):
        raise ValueError('must be an object with a "clip_id"')
    if unknown := sorted(set(row) - known):
        allowed = ", ".join(sorted(known))
        raise ValueError(f"has unknown keys {', '.join(unknown)}; allowed are {allowed}")
    row = {key: value for key, value in row.items() if value is not None}
    if type(row.get("kappa")) in (int, float):
        row["kappa"] = str(row["kappa"])
    for key, value in row.items():
        if not isinstance(value, str):
            raise ValueError(f"has {key} {value!r}; it must be text")
        if fault := texts.fault(value):
            raise ValueError(f"has a {key} that {fault}")
    if row.get("language", "en") not in records.LANGUAGES:
        raise ValueError(f"has the unknown language {row['language']!r}")
    if not _is_share(row.get("kappa", "0")):
        raise ValueError(f"has kappa {row['kappa']!r}; it must be a number from 0 to 1")
    if not re.fullmatch(r"\w+", row.get("split", "train")):
        raise ValueError(f"has the split {row['split']!r}; letters, digits and _ make its name")
    return row | {"clip_id": unicodedata.normalize("NFC", row["clip_id"])}


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def plan(
    inputs: ClipInputs, *, split: str, staging: Path, sampling: decode.FrameSampling
) -> tuple[list[DecodeJob], list[Refusal]]:
    """Matches clips with annotations and labels; refuses clips without a match before decoding."""
    jobs: list[DecodeJob] = []
    refusals: list[Refusal] = []
    seen: dict[str, Path] = {}
    for path, name in inputs.clips.items():
        file = shown(f"{name}{path.suffix}")
        first = seen.setdefault(name, path)
        try:
            if texts.fault(name) or not name.isprintable():
                raise _RefusedError("bad_name", ascii(name))
            if first != path:
                raise _RefusedError("duplicate_id", shown(str(first)))
            annotation = _read_annotation(name, inputs.annotations)
        except _RefusedError as error:
            refusals.append(Refusal(file=file, reason=error.reason, detail=error.detail))
            continue
        known = inputs.labels.get(name, {})
        job = DecodeJob(
            clip_id=name,
            file=file,
            split=known.get("split", split),
            language=known.get("language") or detect_language(annotation),
            path=path,
            staged=staging / f"{_staging_key(name, path, sampling)}.npz",
            annotation=annotation,
            labels={key: known[key] for key in records.LABELS if key in known},
            sampling=sampling,
        )
        jobs.append(job)
    return jobs, refusals


class _RefusedError(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _read_annotation(name: str, files: Mapping[str, Path]) -> dict[str, str]:
    if name not in files:
        detail = f"expected {name}.json in the annotations directory"
        stem = name.rpartition("/")[2]
        if near := [other for other in files if other.rpartition("/")[2] == stem]:
            detail += f"; {near[0]}.json there lies in another folder than the clip"
        raise _RefusedError("no_annotation", detail)
    try:
        return annotations.parse_annotation(_json_of(files[name]))
    except ValueError as error:  # Not text, not JSON, or not the layout.
        raise _RefusedError("bad_annotation", f"{name}.json: {error}") from error


def _json_of(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def detect_language(annotation: Mapping[str, str]) -> str:
    """ "zh" if Chinese characters outnumber Latin words in the descriptions, else "en".

    The transcript is left out: a Chinese annotator may quote English speech.
    """
    text = " ".join(text for field, text in annotation.items() if field != "speech_content")
    return "zh" if len(_CJK.findall(text)) > len(_LATIN.findall(text)) else "en"


def _staging_key(name: str, path: Path, sampling: decode.FrameSampling) -> str:
    """Changes with the file and with the settings, so that stale staged files are not reused."""
    stat = path.stat()
    facts = (name, path.suffix, stat.st_size, stat.st_mtime_ns, dataclasses.astuple(sampling))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def decode_job(job: DecodeJob) -> Refusal | None:
    """Decodes one clip into `job.staged` (media features only), or says why not."""
    try:
        clip = decode.decode_clip(job.path, job.sampling)
        with job.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except decode.MediaError as error:
        return Refusal(file=job.file, reason=error.reason, detail=error.detail)
    except OSError as error:
        return Refusal(file=job.file, reason="unreadable", detail=str(error))
    facts = {"seconds_per_grid": clip.seconds_per_grid, "info": clip.info, "sha256": digest}
    with replacing(job.staged, flush=False) as partial, partial.open("wb") as file:
        np.savez(file, frames=clip.frames, audio=clip.audio, facts=np.array(json.dumps(facts)))
    return None


def load_staged(job: DecodeJob) -> records.Record:
    """The record of a decoded job."""
    with np.load(job.staged, allow_pickle=False) as staged:
        frames, audio = staged["frames"], staged["audio"]
        facts = json.loads(staged["facts"].item())
    return records.Record(
        clip_id=job.clip_id,
        language=job.language,
        frames=frames,
        seconds_per_grid=facts["seconds_per_grid"],
        audio=audio,
        annotation=job.annotation,
        labels=job.labels,
        provenance={
            "file": job.file,
            "sha256": facts["sha256"],
            "sampling": dataclasses.asdict(job.sampling),
            "source": facts["info"],
        },
        audio_in_video=job.sampling.audio_in_video,
    )
