"""Other trainers' rows in one form: a conversation up to its answer, checked.

Each function of FORMATS takes one JSON object and raises RowError if it cannot become a record.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    """(number from 1, value) of a JSON list or of JSON lines; a broken line is its ValueError.

    One value is in memory at a time; of a list, its text too.
    """
    with path.open(encoding="utf-8-sig") as file:
        while (first := file.read(1)).isspace():
            pass
        if first == "[":
            yield from enumerate(_list_items(first + file.read()), start=1)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, error


def _list_items(text: str) -> Iterator[Any]:
    """What json.loads(text) holds, one after another. Raises JSONDecodeError as it does."""
    decoder, space, place = json.JSONDecoder(), re.compile(r"\s*"), 1

    def skipped(start: int) -> int:
        found = space.match(text, start)
        return found.end() if found else start

    place = skipped(place)
    while not text.startswith("]", place):
        value, place = decoder.raw_decode(text, place)
        yield value
        place = skipped(place)
        if text.startswith(",", place):
            place = skipped(place + 1)
        elif not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
