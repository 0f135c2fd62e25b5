"""Conversations and preference pairs in other trainers' formats -> SABER records and pairs.

    python -m data_prep.importers --format FORMAT --input FILE --out OUT [--media DIR]

FORMAT is one of
- ms-swift: JSON lines with messages, videos, audios, images, and for pairs rejected_response or
  rejected_messages;
- trl: JSON lines or a JSON list with prompt, chosen, rejected (conversations or plain texts);
- llama-factory: sharegpt, a JSON list or lines with conversations, and for pairs chosen, rejected.

Writes to OUT the same files as `python -m data_prep.build` (records, tokenizer), refused.jsonl, and
pairs.jsonl if the input has pairs. A record holds one picture or video and one sound. Rows that
need more, or whose rejected answer was given to other media, are listed in refused.jsonl. The
sound track of a video is used if the row names the file in its audios. Of several assistant turns
the last is the target and the others are context. Rows with a "split", as the instructions stage
of data_prep.run writes them, are imported only if it equals --split.

Rows are read, decoded and written one after another, so the input may be larger than memory. Exit
code 0 if every row was kept, 1 if some were refused, 2 if nothing could be imported, 3 if the
import failed.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.records import clips, dataset
from data_prep.records.conversations import FORMATS, Row, RowError, parse_row, read_rows
from saber_jax.data import decode, isolation, media, records, tokenizer
from saber_jax.flags import Parser
from saber_jax.runs import checksums
from saber_jax.runs.files import replacing_folder, write_jsonl

SHOWN_REFUSALS = 20


def to_record(row: Row, folder: Path, sampling: decode.FrameSampling) -> records.Record:
    """Decodes the row's media. Raises MediaError or OSError."""
    frames, seconds, audio = np.zeros((0, 28, 28, 3), np.uint8), 1.0, np.zeros(0, np.int16)
    images, videos, audios = (
        [folder / path for path in row.media[key]] for key in ("images", "videos", "audios")
    )
    source = {}
    if images:
        frames = decode.decode_image(images[0], sampling.mode)
    elif videos:
        clip = decode.decode_clip(videos[0], sampling, sound=videos == audios)
        frames, seconds, audio = clip.frames, clip.seconds_per_grid, clip.audio
        source = clip.info
    if audios and audios != videos:
        audio = decode.decode_sound(audios[0], sampling)
    if audios and not media.audio_tokens(media.mel_frames(len(audio))):
        raise decode.MediaError("no_audio", f"{audios[0].name}: too short to be heard")
    said = " ".join(turn["content"] for turn in row.messages) + row.answer
    return records.Record(
        clip_id=row.clip_id,
        language=row.language or clips.detect_language({"answer": said}),
        frames=frames,
        seconds_per_grid=seconds,
        audio=audio,
        annotation={},
        labels={},
        provenance={
            "files": row.media,
            "sampling": dataclasses.asdict(sampling),
            "source": source,
        },
        messages=tuple(row.messages),
        answer=row.answer,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """A row to be decoded into a record. `new` is False if an earlier row has the same record."""

    number: int
    row: Row
    new: bool
    folder: Path
    sampling: decode.FrameSampling

    def __call__(self) -> records.Record | None:
        return to_record(self.row, self.folder, self.sampling) if self.new else None


class _Import:
    """Iterates over the records of the input, decoding lazily, and writes pairs to a file.

    Only the clip_id and a number, or the refusal, of a finished row stay in memory.
    """

    def __init__(self, flags: argparse.Namespace, pairs: IO[str]):
        self._flags, self._pairs_file = flags, pairs
        self._answers: dict[str, int] = {}  # Hash of the answer that each record has.
        self._failed: dict[str, Exception] = {}
        self.rows = self.made = self.pairs = 0
        self.refused: list[tuple[int, Exception]] = []
        self.of_other_splits: Counter[str] = Counter()

    def __iter__(self) -> Iterator[records.Record]:
        for task, result in isolation.ahead(self._tasks(), self._flags.workers):
            if isinstance(result, Exception):
                self._failed[task.row.clip_id] = result
            elif result is not None:
                self._answers[task.row.clip_id] = hash(task.row.answer)
                self.made += 1
                yield result
            self._settle(task)

    def _tasks(self) -> Iterator[_Task]:
        folder = self._flags.media or self._flags.input.parent
        met: set[str] = set()
        for number, value in read_rows(self._flags.input):
            self.rows += 1
            try:
                if isinstance(value, Exception):
                    raise RowError(f"it is not JSON: {value}") from value
                row = parse_row(value, self._flags.format, self._flags.split)
            except RowError as error:
                self.refused.append((number, error))
                continue
            if isinstance(row, str):
                self.of_other_splits[row] += 1
                continue
            new, sampling = row.clip_id not in met, self._flags.sampling
            met.add(row.clip_id)
            yield _Task(number=number, row=row, new=new, folder=folder, sampling=sampling)

    def _settle(self, task: _Task) -> None:
        """Refuses the row of a task, or writes its pair, once its record is done or has failed."""
        row = task.row
        if row.clip_id in self._failed:
            self.refused.append((task.number, self._failed[row.clip_id]))
        elif row.rejected is not None:
            pair = {"clip_id": row.clip_id, "chosen": row.answer, "rejected": row.rejected}
            self._pairs_file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            self.pairs += 1
        elif self._answers[row.clip_id] != hash(row.answer):
            detail = "another row asks the same about the same media, with another answer"
            self.refused.append((task.number, RowError(detail)))

    def refusals(self) -> list[dict[str, str]]:
        """The lines of refused.jsonl, in the input's order."""
        return [
            {
                "file": f"{self._flags.input.name}:{number}",
                "reason": type(error).__name__,
                "detail": str(error).encode(errors="backslashreplace").decode(),
            }
            for number, error in sorted(self.refused, key=lambda entry: entry[0])
        ]


def run(flags: argparse.Namespace) -> int:
    """Imports; returns the exit code. Raises ValueError or OSError if nothing can be imported."""
    if flags.out.exists() and any(flags.out.iterdir()):
        raise ValueError(f"{flags.out} is not empty; choose another --out.")
    with replacing_folder(flags.out) as partial:  # Replaces an empty folder, if there is one.
        result = _import(flags, partial)
    others = "".join(f", {n} of split {name}" for name, n in result.of_other_splits.items())
    counts = f"{result.made} records, {result.pairs} pairs, {len(result.refused)} refused{others}"
    print(f"{result.rows} rows: {counts} in {flags.out}")
    for entry in result.refusals()[:SHOWN_REFUSALS]:
        print(f"  {entry['file']}: {entry['detail']}")
    return 1 if result.refused else 0


def _import(flags: argparse.Namespace, out: Path) -> _Import:
    pairs = out / "pairs.jsonl"
    with checksums.written(pairs), pairs.open("w", encoding="utf-8") as file:
        result = _Import(flags, file)
        made = iter(result)
        first = next(made, None)  # A split without records cannot be written.
        if first is None:
            raise ValueError(_nothing(result, flags))
        dataset.write(out, {flags.split: itertools.chain([first], made)}, lambda record: record)
    if not result.pairs:
        pairs.unlink()
        checksums.beside(pairs).unlink()
    tokenizer.copy(flags.tokenizer, out)
    write_jsonl(out / "refused.jsonl", result.refusals())
    return result


def _nothing(result: _Import, flags: argparse.Namespace) -> str:
    text = f"None of the {result.rows} rows of {flags.input} could be used."
    if result.of_other_splits:
        text += f" They are of split {', '.join(result.of_other_splits)}; choose it with --split."
    if refused := result.refusals():
        text += f" The first: {refused[0]['file']}: {refused[0]['detail']}."
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; see the module docstring."""
    parser = Parser(
        prog="python -m data_prep.importers",
        description=__doc__,
    )
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument(
        "--media", type=Path, help="root of relative paths; default: that of --input"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or .model")
    parser.add_argument(
        "--split", default="train", help="split to import; also that of rows that name none"
    )
    parser.add_argument("--mode", choices=decode.MODES, default="exact")
    parser.add_argument(
        "--workers", type=int, default=1, help="decoding processes; 0: decode in this process"
    )
    flags = parser.parse_args(argv)
    flags.sampling = decode.FrameSampling() if flags.mode == "exact" else decode.release_sampling()
    try:
        tokenizer.load_tokenizer(flags.tokenizer)
        return run(flags)
    except (ValueError, OSError) as error:
        print(f"data_prep.importers: {error}", file=sys.stderr)
        return 2
    except Exception:  # Python's exit code would be 1, which means that rows were refused.
        traceback.print_exc()
        return 3


if __name__ == "__main__":
    sys.exit(main())
