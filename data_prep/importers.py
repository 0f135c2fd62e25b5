"""Conversations and preference pairs in other trainers' formats -> SABER records and pairs.

    python -m data_prep.importers --format FORMAT --input FILE --out OUT [--media DIR]

FORMAT is one of
- ms-swift: JSON lines with messages, videos, audios, images, and for pairs rejected_response or
  rejected_messages;
- trl: JSON lines or a JSON list with prompt, chosen, rejected (conversations or plain texts);
- llama-factory: sharegpt, a JSON list or lines with conversations, and for pairs chosen, rejected.

Leaves in OUT what `python -m data_prep.build` leaves (records, tokenizer), refused.jsonl, and
pairs.jsonl if the file holds pairs. A record holds one picture or video and one sound; a row that
needs more is refused by name, as is one whose rejected answer was given to other media. A video's
own sound is heard where the row names the file in its audios. Of several assistant turns the last
is what is learnt, the others are context.

Exit code 0 if every row was kept, 1 if some were refused, 2 if nothing could be imported.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import clips, dataset
from saber_jax.data import decode, records, tokenizer
from saber_jax.data.journal import write_jsonl

TAGS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}
KINDS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
Turns = list[dict[str, str]]


class RowError(ValueError):
    """A row that cannot become a record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A conversation up to its answer, in one form whatever it came from."""

    messages: Turns
    answer: str
    rejected: str | None
    media: dict[str, list[str]]

    @property
    def clip_id(self) -> str:
        """The same for rows that ask the same about the same media, which share a record."""
        key = json.dumps([self.messages, self.media], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(key.encode()).hexdigest()[:16]


def from_ms_swift(row: dict[str, Any]) -> Row:
    """https://swift.readthedocs.io, custom datasets."""
    media = _media(row)
    prompt, answer = _split(_turns(row.get("messages"), "role", "content", "messages"))
    rejected = row.get("rejected_response")
    if isinstance(rejected, list):
        rejected = _split([*prompt, *_turns(rejected, "role", "content", "rejected_response")])[1]
    if row.get("rejected_messages"):
        turns = _turns(row["rejected_messages"], "role", "content", "rejected_messages")
        other, rejected = _split(turns)
        if other != prompt:
            raise RowError("rejected_messages asks something else than messages")
        for key, paths in media.items():
            if row.get(f"rejected_{key}", paths) != paths:
                raise RowError(f"rejected_{key} are other files than {key}; a pair has one clip")
    return _row(prompt, answer, rejected, media)


def from_trl(row: dict[str, Any]) -> Row:
    """https://huggingface.co/docs/trl/dataset_formats; the prompt may be part of both answers."""
    sides = {key: _trl_turns(row.get(key), key) for key in ("chosen", "rejected")}
    if row.get("prompt"):
        prompt = _trl_turns(row["prompt"], "prompt", role="user")
        sides = {key: [*prompt, *turns] for key, turns in sides.items()}
    (prompt, answer), (other, rejected) = (_split(turns) for turns in sides.values())
    if other != prompt:
        raise RowError("chosen and rejected begin with different conversations")
    return _row(prompt, answer, rejected, _media(row))


def from_llama_factory(row: dict[str, Any]) -> Row:
    """https://github.com/hiyouga/LLaMA-Factory, data/README: sharegpt, `ranking` or not."""
    turns = _turns(row.get("conversations"), "from", "value", "conversations")
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    rejected = None
    if "chosen" in row:
        chosen, rejected = (
            _turns([row.get(key)], "from", "value", key)[0]["content"]
            for key in ("chosen", "rejected")
        )
        turns.append({"role": "assistant", "content": chosen})
    prompt, answer = _split(turns)
    return _row(prompt, answer, rejected, _media(row))


FORMATS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "ms-swift": from_ms_swift,
    "trl": from_trl,
    "llama-factory": from_llama_factory,
}


def _media(row: dict[str, Any]) -> dict[str, list[str]]:
    media = {key: row.get(key) or [] for key in TAGS}
    media = {key: [paths] if isinstance(paths, str) else paths for key, paths in media.items()}
    for key, paths in media.items():
        if not all(isinstance(path, str) for path in paths):
            raise RowError(f"{key} must be paths of files")
    return media


def _turns(value: Any, role: str, content: str, where: str) -> Turns:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError(f"{where} must be a list of turns with {role!r} and {content!r}")
    turns = []
    for turn in value:
        if not isinstance(turn.get(content), str) or not isinstance(turn.get(role), str):
            raise RowError(f"a turn of {where} lacks {role!r} or {content!r} as text")
        turns.append({"role": ROLES.get(turn[role], turn[role]), "content": turn[content]})
    return turns


def _trl_turns(value: Any, where: str, role: str = "assistant") -> Turns:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise RowError(f"{where} must be a text or a list of messages")
    return _turns([_flattened(turn) for turn in value], "role", "content", where)


def _flattened(turn: Any) -> Any:
    """[{"type": "image"}, {"type": "text", "text": "q"}] -> "<image>q"."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    parts = [
        part.get("text", "") if part.get("type") == "text" else KINDS.get(part.get("type"), "")
        for part in turn["content"]
    ]
    return turn | {"content": "".join(parts)}


def _split(turns: Turns) -> tuple[Turns, str]:
    """(everything before, the last answer)."""
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("the conversation does not end with an answer")
    if unknown := {turn["role"] for turn in turns} - {"system", "user", "assistant"}:
        raise RowError(f"unknown roles {', '.join(sorted(unknown))}")
    return turns[:-1], turns[-1]["content"]


def _row(prompt: Turns, answer: str, rejected: Any, media: dict[str, list[str]]) -> Row:
    """Checks, and puts the tags that are missing before the first question, pictures first."""
    if rejected is not None and not isinstance(rejected, str):
        raise RowError("the rejected answer must be text")
    if rejected == answer:
        raise RowError("chosen and rejected are the same text")
    pictures = len(media["images"]) + len(media["videos"])
    if pictures > 1 or len(media["audios"]) > 1:
        sounds = len(media["audios"])
        raise RowError(f"{pictures} pictures or videos and {sounds} sounds; a record has one each")
    asked = next((turn for turn in prompt if turn["role"] == "user"), None)
    if asked is None:
        raise RowError("nobody asks anything")
    text = "".join(turn["content"] for turn in prompt)
    missing = ""
    for key, tag in TAGS.items():
        named = len(re.findall(tag, text))
        if named > len(media[key]):
            raise RowError(f"{named} times {tag}, but {len(media[key])} {key}")
        missing += tag * (len(media[key]) - named)
    prompt = [
        turn | {"content": missing + turn["content"]} if turn is asked else turn for turn in prompt
    ]
    return Row(messages=prompt, answer=answer, rejected=rejected, media=media)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of a JSON list or of JSON lines; a broken line is its ValueError."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        yield from enumerate(json.loads(text), start=1)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            yield number, error


def to_record(row: Row, folder: Path, sampling: decode.Sampling) -> records.Record:
    """Decodes the row's media. Raises MediaError or OSError."""
    frames, seconds, audio = np.zeros((0, 28, 28, 3), np.uint8), 1.0, np.zeros(0, np.int16)
    images, videos, audios = (
        [folder / path for path in row.media[key]] for key in ("images", "videos", "audios")
    )
    if images:
        frames = decode.decode_image(images[0], sampling.mode)
    elif videos:
        clip = decode.decode_clip(videos[0], sampling, sound=videos == audios)
        frames, seconds, audio = clip.frames, clip.seconds_per_grid, clip.audio
    if audios and audios != videos:
        audio = decode.decode_sound(audios[0], sampling)
    said = " ".join(turn["content"] for turn in row.messages) + row.answer
    return records.Record(
        clip_id=row.clip_id,
        language=clips.detect_language({"answer": said}),
        frames=frames,
        seconds_per_grid=seconds,
        audio=audio,
        annotation={},
        labels={},
        provenance={"files": row.media, "sampling": dataclasses.asdict(sampling)},
        messages=tuple(row.messages),
        answer=row.answer,
    )


def run(flags: argparse.Namespace) -> int:
    """Imports; returns the exit code. Raises ValueError or OSError if nothing can be imported."""
    if flags.out.exists() and any(flags.out.iterdir()):
        raise ValueError(f"{flags.out} is not empty; choose another --out.")
    made: dict[str, records.Record] = {}
    pairs, refused, rows = [], [], list(read_rows(flags.input))
    for number, value in rows:
        try:
            if not isinstance(value, dict):
                raise RowError(f"not a JSON object: {value}")
            row = FORMATS[flags.format](value)
            if row.clip_id not in made:
                made[row.clip_id] = to_record(
                    row, flags.media or flags.input.parent, flags.sampling
                )
            elif row.rejected is None and made[row.clip_id].answer != row.answer:
                raise RowError(
                    "another row asks the same about the same media, with another answer"
                )
        except (RowError, decode.MediaError, OSError) as error:
            where = f"{flags.input.name}:{number}"
            refused.append({"file": where, "reason": type(error).__name__, "detail": str(error)})
            continue
        if row.rejected is not None:
            pair = {"clip_id": row.clip_id, "chosen": row.answer, "rejected": row.rejected}
            pairs.append(pair)
    if not made:
        detail = f" The first: {refused[0]['file']}: {refused[0]['detail']}." if refused else ""
        raise ValueError(f"None of the {len(rows)} rows of {flags.input} could be used.{detail}")
    flags.out.mkdir(parents=True, exist_ok=True)
    dataset.write(flags.out, {flags.split: list(made.values())}, lambda record: record)
    shutil.copyfile(flags.tokenizer, flags.out / f"tokenizer{flags.tokenizer.suffix}")
    write_jsonl(flags.out / "refused.jsonl", refused)
    if pairs:
        write_jsonl(flags.out / "pairs.jsonl", pairs)
    counts = f"{len(made)} records, {len(pairs)} pairs, {len(refused)} refused"
    print(f"{len(rows)} rows: {counts} in {flags.out}")
    for entry in refused[:20]:
        print(f"  {entry['file']}: {entry['detail']}")
    return 1 if refused else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.importers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--media", type=Path, help="what paths are relative to; default: --input's")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or .model")
    parser.add_argument("--split", default="train")
    parser.add_argument("--mode", choices=decode.MODES, default="exact")
    flags = parser.parse_args(argv)
    flags.sampling = decode.Sampling() if flags.mode == "exact" else decode.release_sampling()
    try:
        tokenizer.load_tokenizer(flags.tokenizer)
        return run(flags)
    except (ValueError, OSError) as error:
        print(f"data_prep.importers: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
