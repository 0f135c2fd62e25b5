"""Builds SABER records and a vocabulary from video files and SABER annotations.

    python -m data_prep.build --clips DIR --annotations DIR --out OUT [--labels labels.jsonl]

Writes to OUT: saber/ (the records; read with saber_jax.data.records.RecordSource, or with
tfds.data_source("saber", data_dir=OUT, split="train")), tokenizer.model, refused.jsonl (every clip
that was left out, with the reason) and build.json (settings, counts, and unused files).
docs/formats.md describes annotations and labels.

Exit code 0 if every clip was kept, 1 if some were refused, 2 if nothing could be built, 3 if the
build failed, here or in Beam. An interrupted build continues when the command is repeated; a
finished one is not changed.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.records import clips, processes
from saber_jax.data import annotations, decode, records, sed, texts, tokenizer
from saber_jax.flags import Parser
from saber_jax.runs.files import replacing_folder, write_json, write_jsonl

FORMAT = 3
"""Version of the output format; part of the fingerprint of a build."""

EXACT, RELEASE = decode.FrameSampling(), decode.release_sampling()
TRAIN = "train"
SHOWN_REFUSALS = 20
SHOWN_UNUSED = 10
UNUSED = {
    "files": "files were ignored because they are neither clips nor annotations",
    "annotations": "annotations have no clip",
    "labels": "labels have no clip",
    "unlabelled": "clips have no line in the labels and take the split of --split",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; see the module docstring."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        with _lock(arguments.out):
            return build(arguments)
    except (ValueError, OSError) as error:
        print(f"data_prep.build: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"Interrupted. Decoded clips are kept in {_partial(arguments.out)}; the same command "
            "continues from there.",
            file=sys.stderr,
        )
        return 130
    except Exception:  # Python's exit code would be 1, which means that clips were refused.
        traceback.print_exc()
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m data_prep.build",
        description=__doc__,
    )
    path, whole = Path, int
    parser.add_argument("--clips", type=path, required=True, help="folder of videos")
    parser.add_argument(
        "--annotations", type=path, required=True, help="A/NAME.json for A/NAME.mp4"
    )
    parser.add_argument("--out", type=path, required=True, help="directory to create")
    parser.add_argument("--labels", type=path, help="labels.jsonl with split, language, emotion")
    parser.add_argument("--split", default=TRAIN, help="split of clips without a label")
    parser.add_argument("--mode", choices=decode.MODES, default="exact")
    for flag, meaning in (
        ("--fps", "frames per second to keep"),
        ("--max_frames", "maximum number of frames per clip"),
        ("--min_pixels", "minimum pixels per frame"),
        ("--max_pixels", "maximum pixels per frame"),
        ("--max_seconds", "longer clips are refused"),
    ):
        # None stands for the default of --mode, which argparse does not know yet.
        name = flag.removeprefix("--")
        kind, said = type(getattr(EXACT, name)), f"{meaning} ({_default(name)})"
        parser.add_argument(flag, type=kind, help=said)
    parser.add_argument(
        "--audio_in_video",
        action="store_true",
        default=None,
        help="interleave the sound with the video every 2 s; by default it follows the video",
    )
    parser.add_argument("--vocab_size", type=whole, default=1064)
    parser.add_argument(
        "--tokenizer", default="train", help="tokenizer file to copy, or 'train' (the default)"
    )
    parser.add_argument(
        "--workers",
        type=whole,
        default=2,
        help="decoding processes; with 0 a file that crashes a decoder ends the build",
    )
    parser.add_argument(
        "--beam_pipeline_options",
        type=_beam_options,
        default=(),
        metavar="NAME=VALUE,...",
        help="decode the clips and write the same records with Apache Beam, for example "
        "runner=DataflowRunner,project=P; its workers must be able to read --clips and OUT.partial",
    )
    return parser


def _default(name: str) -> str:
    exact, release = getattr(EXACT, name), getattr(RELEASE, name)
    return f"default: {exact}" + (f", or {release} with saber_release" if release != exact else "")


def _beam_options(text: str) -> tuple[str, ...]:
    """NAME=VALUE,... as the command of tensorflow-datasets takes them."""
    return tuple(f"--{option}" for option in text.split(",") if option)


def build(arguments: argparse.Namespace) -> int:
    """One build; returns the exit code. Raises ValueError or OSError if nothing can be built."""
    out, sampling = arguments.out, _sampling(arguments)
    inputs = clips.find_inputs(arguments.clips, arguments.annotations, arguments.labels)
    fingerprint = _fingerprint(arguments, sampling, inputs)
    if finished := _finished(out, fingerprint):
        print(f"{out} is already built with these settings and inputs; nothing to do.")
        return _report(out, finished, _read_refusals(out))

    partial = _partial(out)
    staging = partial / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    jobs, refusals = clips.plan(inputs, split=arguments.split, staging=staging, sampling=sampling)
    _require_training_text(arguments, jobs)
    kept, refused = _decode(jobs, arguments.workers, arguments.beam_pipeline_options)
    refusals = sorted([*refusals, *refused], key=lambda refusal: refusal.file)
    counted = {"clips": len(inputs.clips), "unused": inputs.unused()}
    if not kept:
        _report(out, {"splits": {}, **counted}, refusals)
        raise ValueError(f"None of the {len(inputs.clips)} clips in {arguments.clips} can be used.")
    with replacing_folder(out, partial=partial / "ready") as ready:
        summary = _write(ready, arguments, kept, refusals)
        summary |= {**counted, **fingerprint}
        write_json(ready / "build.json", summary)
        if out.exists():
            out.rmdir()  # Empty when the build began. Fails if somebody has put files there since.
    shutil.rmtree(staging, ignore_errors=True)
    return _report(out, summary, refusals)


def _sampling(arguments: argparse.Namespace) -> decode.FrameSampling:
    base = EXACT if arguments.mode == "exact" else RELEASE
    names = [field.name for field in dataclasses.fields(base)]
    given = {name: getattr(arguments, name, None) for name in names}
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Prevents two concurrent builds into one directory. The lock is released with its process."""
    partial = _partial(out)
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another build of {out} is running; wait for it to end.") from None
        yield
    if not (partial / "staging").exists():
        shutil.rmtree(partial, ignore_errors=True)


def _fingerprint(
    arguments: argparse.Namespace, sampling: decode.FrameSampling, inputs: clips.ClipInputs
) -> dict[str, Any]:
    """Everything that decides the result. Files count by name, size and time; none is read."""
    given = arguments.tokenizer
    vocabulary = {"vocab_size": arguments.vocab_size} if given == "train" else {}
    return {
        "format": FORMAT,
        "settings": {
            "split": arguments.split,
            **dataclasses.asdict(sampling),
            "tokenizer": "train" if given == "train" else _file_key({given: Path(given)}),
            **vocabulary,
        },
        "inputs": {
            "clips": _file_key({n + p.suffix: p for p, n in inputs.clips.items()}),
            "annotations": _file_key(inputs.annotations),
            "labels": _file_key({"": arguments.labels} if arguments.labels else {}),
        },
    }


def _file_key(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        stat = path.stat()
        digest.update(ascii((name, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _finished(out: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of an earlier build like this one. ValueError if OUT holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    file = out / "build.json"
    if not file.is_file():
        raise ValueError(f"{out} exists and is not a build; choose another --out.")
    summary = json.loads(file.read_text(encoding="utf-8"))
    changed = [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for old, new in [(summary.get(part, {}), fingerprint[part]) for part in _PARTS]
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if summary.get("format") != FORMAT:
        changed.append(f"format {summary.get('format')} -> {FORMAT}")
    if changed:
        raise ValueError(
            f"{out} was built differently ({'; '.join(changed)}). Choose another --out, or delete "
            "it to build again."
        )
    return summary


_PARTS = ("settings", "inputs")


def _require_training_text(arguments: argparse.Namespace, jobs: Sequence[clips.DecodeJob]) -> None:
    """Raises ValueError, before the long work, if there is no text to train a vocabulary on."""
    if arguments.tokenizer != "train":
        tokenizer.load_tokenizer(arguments.tokenizer)
    elif jobs and not any(job.split == TRAIN for job in jobs):
        raise ValueError(
            f"No clip is in the split {TRAIN!r}, so no text to train a vocabulary on. Pass the one "
            "of the training records with --tokenizer FILE."
        )


def _decode(
    jobs: Sequence[clips.DecodeJob], workers: int, beam: Sequence[str]
) -> tuple[list[clips.DecodeJob], list[clips.Refusal]]:
    """Decodes clips that are not staged yet; returns the usable jobs and the refused clips."""
    todo = [job for job in jobs if not job.staged.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} clips were decoded by an earlier run.")
    results = processes.run_beam(todo, beam) if beam else processes.run_jobs(todo, workers)
    refused: dict[str, clips.Refusal] = {}
    for job, refusal in tqdm(results, total=len(todo), desc="decode", unit="clip"):
        if refusal:
            refused[job.clip_id] = refusal
    return [job for job in jobs if job.clip_id not in refused], list(refused.values())


def _write(
    ready: Path,
    arguments: argparse.Namespace,
    jobs: Sequence[clips.DecodeJob],
    refusals: Iterable[clips.Refusal],
) -> dict[str, Any]:
    from data_prep.records import dataset  # Slow to import, and decoding does not need it.

    vocabulary = _vocabulary(ready, arguments, jobs)
    write_jsonl(ready / "refused.jsonl", map(dataclasses.asdict, refusals))
    by_split: dict[str, list[clips.DecodeJob]] = {}
    for job in jobs:
        by_split.setdefault(job.split, []).append(job)
    splits = dataset.write(ready, by_split, clips.load_staged, beam=arguments.beam_pipeline_options)
    targets = [sed.section_of_tokens(vocabulary, sed.target_text(job.annotation)) for job in jobs]
    lengths = sorted(len(ids) for ids, _ in targets)
    return {
        "splits": splits,
        "refused": dict(Counter(refusal.reason for refusal in refusals)),
        "vocabulary": vocabulary.vocab_size,
        "target_tokens": {
            "mean": round(sum(lengths) / len(lengths), 1),
            "longest": lengths[-1],
        },
    }


def _vocabulary(
    ready: Path, arguments: argparse.Namespace, jobs: Sequence[clips.DecodeJob]
) -> tokenizer.Tokenizer:
    if arguments.tokenizer != "train":
        return tokenizer.load_tokenizer(tokenizer.copy(arguments.tokenizer, ready))
    train = [job for job in jobs if job.split == TRAIN]
    said = [sed.target_text(job.annotation) for job in train]
    # Once per clip, as often as training sees it, so that the vocabulary encodes it in few tokens.
    said += [sed.prompt_text(job.language, True, True) for job in train]
    headings = [sed.heading(field) for field in records.FIELDS]
    out = ready / "tokenizer.model"
    return tokenizer.train_sentencepiece(
        said, out, vocab_size=arguments.vocab_size, symbols=headings
    )


def _read_refusals(out: Path) -> list[clips.Refusal]:
    text = (out / "refused.jsonl").read_text(encoding="utf-8")
    return [clips.Refusal(**json.loads(line)) for _, line in texts.lines(text)]


def _report(out: Path, summary: dict[str, Any], refusals: Sequence[clips.Refusal]) -> int:
    kept = sum(summary["splits"].values())
    splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items()) or "none"
    print(f"Kept {kept} of {summary['clips']} clips in {out}: {splits}.")
    if "target_tokens" in summary:
        tokens = summary["target_tokens"]
        print(
            f"Vocabulary of {summary['vocabulary']}; a target has {tokens['mean']} tokens on "
            f"average, {tokens['longest']} at most."
        )
    for reason, count in Counter(refusal.reason for refusal in refusals).items():
        print(f"Refused {count}, {reason}: {clips.REASONS[reason]}.")
        chosen = [refusal for refusal in refusals if refusal.reason == reason]
        for refusal in chosen[:SHOWN_REFUSALS]:
            print(f"  {refusal.file}: {refusal.detail}")
        if count > SHOWN_REFUSALS:
            print(f"  and {count - SHOWN_REFUSALS} more in refused.jsonl.")
        if reason == "bad_annotation":
            print(f"An annotation looks like this:\n{annotations.ANNOTATION_SHAPE}")
    for kind, names in summary["unused"].items():
        if names:
            listed = texts.listed([clips.shown(name) for name in names], SHOWN_UNUSED)
            print(f"{len(names)} {UNUSED[kind]}: {listed}.")
    return 1 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())
