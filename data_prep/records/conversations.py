"""Converts rows of other trainers' data sets to one form: a conversation and its answer.

Each function of FORMATS takes one JSON object and raises RowError if it cannot become a record.
The content of a row is used or refused: no key and no part of a message is skipped because it is
not understood.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saber_jax.data import texts
from saber_jax.data.records import LANGUAGES
from saber_jax.runs.files import parse_json

TAGS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}
KINDS = {"image": "images", "video": "videos", "audio": "audios"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
Turns = list[dict[str, str]]
Media = dict[str, list[str]]

# Parts of keys that name media, questions or answers. If a row has such a key that is not read
# here, it is refused: without it, training would be on another task than the row describes. Any
# other key (id, source, ...) is ignored.
_MEANT = re.compile(
    r"image|video|audio|media|messages|conversation|prompt|chosen|rejected|response|query|history|"
    r"system|instruction|input|output|answer|question|tool|object|bbox|label|kto|loss|content",
    re.IGNORECASE,
)


class RowError(ValueError):
    """A row that cannot become a record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A conversation and its answer, in a form that does not depend on the source format.

    `language` is None if the row does not name it.
    """

    messages: Turns
    answer: str
    rejected: str | None
    media: dict[str, list[str]]
    language: str | None = None

    @property
    def clip_id(self) -> str:
        """Equal for rows with the same conversation about the same media, which share a record."""
        key = json.dumps([self.messages, self.media], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(key.encode()).hexdigest()[:16]


def from_ms_swift(row: dict[str, Any]) -> Row:
    """https://swift.readthedocs.io, custom datasets."""
    rejected_media = {f"rejected_{key}" for key in TAGS}
    media = _media(row)
    _check_keys(
        row, {"messages", "system", "rejected_response", "rejected_messages"} | rejected_media
    )
    turns = _turns(row.get("messages"), "role", "content", "messages", media)
    prompt, answer = _split(_with_system(row, turns))
    for key, paths in media.items():
        if _paths(row.get(f"rejected_{key}"), f"rejected_{key}") not in ([], paths):
            raise RowError(f"rejected_{key} are other files than {key}; a pair has one clip")
    rejected = row.get("rejected_response")
    if isinstance(rejected, list):
        rejected = _split([*prompt, *_turns(rejected, "role", "content", "rejected_response")])[1]
    if row.get("rejected_messages") is not None:
        shown: Media = {key: [] for key in TAGS}
        turns = _turns(row["rejected_messages"], "role", "content", "rejected_messages", shown)
        other, rejected = _split(_with_system(row, turns))
        if other != prompt:
            raise RowError("rejected_messages has another question than messages")
        for key, paths in media.items():
            if shown[key] not in ([], paths):
                raise RowError(f"rejected_messages shows other {key} than messages do")
    return _row(prompt, answer, rejected, media)


def from_trl(row: dict[str, Any]) -> Row:
    """https://huggingface.co/docs/trl/dataset_formats; the prompt may be part of both answers."""
    media = _media(row)
    _check_keys(row, {"prompt", "chosen", "rejected"})
    asked = [] if row.get("prompt") is None else _trl_turns(row["prompt"], "prompt", media, "user")
    named = {key: list(paths) for key, paths in media.items()}
    chosen = _trl_turns(row.get("chosen"), "chosen", media)
    rejected = _trl_turns(row.get("rejected"), "rejected", named)
    if media != named:
        raise RowError("chosen and rejected show different media; a pair has one clip")
    (prompt, answer), (other, worse) = _split([*asked, *chosen]), _split([*asked, *rejected])
    if other != prompt:
        raise RowError("chosen and rejected begin with different conversations")
    return _row(prompt, answer, worse, media)


def from_llama_factory(row: dict[str, Any]) -> Row:
    """https://github.com/hiyouga/LLaMA-Factory, data/README: sharegpt, `ranking` or not."""
    media = _media(row)
    _check_keys(row, {"conversations", "system", "chosen", "rejected"})
    turns = _turns(row.get("conversations"), "from", "value", "conversations")
    turns, rejected = _with_system(row, turns), None
    if row.get("chosen") is not None or row.get("rejected") is not None:
        chosen, rejected = (
            _turns([row.get(key)], "from", "value", key)[0]["content"]
            for key in ("chosen", "rejected")
        )
        turns.append({"role": "assistant", "content": chosen})
    prompt, answer = _split(turns)
    return _row(prompt, answer, rejected, media)


def parse_row(row: Any, layout: str, split: str) -> Row | str:
    """The row of a JSON value in the format `layout`; for a row of another split, its name.

    Raises RowError.
    """
    if not isinstance(row, dict):
        raise RowError(f"it is not a JSON object but {_short(row)}")
    for key in ("split", "language"):
        if not isinstance(row.get(key), str | None):
            raise RowError(f"{key} must be text, got {_short(row[key])}")
    if (given := row.get("split") or split) != split:
        return given
    language = row.get("language") or None
    if language not in (None, *LANGUAGES):
        raise RowError(f"language must be one of {', '.join(LANGUAGES)}, got {_short(language)}")
    return dataclasses.replace(FORMATS[layout](row), language=language)


FORMATS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "ms-swift": from_ms_swift,
    "trl": from_trl,
    "llama-factory": from_llama_factory,
}


def _check_keys(row: dict[str, Any], read: set[str]) -> None:
    """Refuses keys that have a meaning but are not supported, unless their value is empty."""
    for key, value in row.items():
        known = read | {*TAGS, *KINDS, "split", "language"}
        if key not in known and value not in (None, "", [], {}) and _MEANT.search(str(key)):
            raise RowError(f"the key {key!r} is not read; read are {', '.join(sorted(known))}")


def _media(row: dict[str, Any]) -> Media:
    """Paths under images, videos and audios, or under their singulars."""
    media = {}
    for one, many in KINDS.items():
        given = {key: found for key in (one, many) if (found := _paths(row.get(key), key))}
        if len(given) == 2:
            raise RowError(f"it has both {one!r} and {many!r}; write all of them under {many!r}")
        media[many] = next(iter(given.values()), [])
    return media


def _paths(value: Any, key: str) -> list[str]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise RowError(f"{key} must be paths of files, got {_short(value)}")
    for path in paths:
        if fault := texts.fault(path):
            raise RowError(f"a path of {key} {fault}")
    return list(paths)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else text[:57] + "..."


def _with_system(row: dict[str, Any], turns: Turns) -> Turns:
    system = row.get("system")
    if system in (None, ""):
        return turns
    if not isinstance(system, str):
        raise RowError(f"system must be text, got {_short(system)}")
    if turns and turns[0]["role"] == "system":
        raise RowError("it has both a system key and a system turn")
    return [{"role": "system", "content": system}, *turns]


def _turns(value: Any, role: str, content: str, where: str, media: Media | None = None) -> Turns:
    """Turns with our own two keys; media that message parts name are added to `media`."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError(f"{where} must be a list of turns with {role!r} and {content!r}")
    turns = []
    for turn in value:
        for key, given in turn.items():
            if key not in (role, content, "name") and given not in (None, "", [], {}):
                raise RowError(f"a turn of {where} has {key!r}, which is not read")
        said = turn.get(content)
        if media is not None and isinstance(said, list):
            said = "".join(_part(part, where, media) for part in said)
        if not isinstance(said, str) or not isinstance(turn.get(role), str):
            raise RowError(f"a turn of {where} lacks {role!r} or {content!r} as text")
        turns.append({"role": ROLES.get(turn[role], turn[role]), "content": said})
    return turns


def _part(part: Any, where: str, media: Media) -> str:
    """{"type": "text", "text": "q"} -> "q", {"type": "image", "image": PATH} -> "<image>"."""
    if not isinstance(part, dict):
        raise RowError(f"a part of {where} must be an object with a type, got {_short(part)}")
    kind = part.get("type")
    if kind not in ("text", *KINDS):
        raise RowError(
            f"a part of {where} has the type {_short(kind)}; read are text, {', '.join(KINDS)}"
        )
    for key, value in part.items():
        if key not in ("type", kind) and value not in (None, "", [], {}):
            raise RowError(f"a part of {where} has {_short(key)} beside its {kind}")
    value = part.get(kind)
    if kind == "text":
        if value is not None and not isinstance(value, str):
            raise RowError(f"a part of {where} must have text, got {_short(value)}")
        return value or ""
    media[KINDS[kind]] += _paths(value, f"a part of {where}")
    return TAGS[KINDS[kind]]


def _trl_turns(value: Any, where: str, media: Media, role: str = "assistant") -> Turns:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise RowError(f"{where} must be a text or a list of messages")
    return _turns(value, "role", "content", where, media)


def _split(turns: Turns) -> tuple[Turns, str]:
    """(everything before, the last answer)."""
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("the conversation does not end with an answer")
    if unknown := {turn["role"] for turn in turns} - {"system", "user", "assistant"}:
        raise RowError(f"unknown roles {', '.join(sorted(unknown))}")
    return turns[:-1], turns[-1]["content"]


def _row(prompt: Turns, answer: str, rejected: Any, media: dict[str, list[str]]) -> Row:
    """Checks the row and puts missing media tags before the first question, pictures first."""
    if rejected is not None and not isinstance(rejected, str):
        raise RowError("the rejected answer must be text")
    for name, said in (("answer", answer), ("rejected answer", rejected)):
        if said is not None and not said.strip():
            raise RowError(f"the {name} is empty")
        if said is not None and (tag := re.search("|".join(TAGS.values()), said)):
            raise RowError(f"the {name} holds {tag[0]}; media stand in the question alone")
    for said in (*(turn["content"] for turn in prompt), answer, rejected or ""):
        if fault := texts.fault(said):
            raise RowError(f"a text {fault}")
    if rejected == answer:
        raise RowError("chosen and rejected are the same text")
    pictures = len(media["images"]) + len(media["videos"])
    if pictures > 1 or len(media["audios"]) > 1:
        sounds = len(media["audios"])
        raise RowError(f"{pictures} pictures or videos and {sounds} sounds; a record has one each")
    asked = next((turn for turn in prompt if turn["role"] == "user"), None)
    if asked is None:
        raise RowError("the conversation has no user turn")
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
    """(number from 1, value) of a JSON list or of JSON lines; for an invalid value, its error.

    One value is in memory at a time; for a list, the text of the file too. Raises ValueError naming
    the file if it begins like a list and is none.
    """
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        if first == b"[":
            try:
                text = file.read().decode("utf-8-sig")
                yield from enumerate(_list_items(text[text.index("[") :]), start=1)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path} begins like a JSON list but is none: {error}. Repair it, or write one "
                    "JSON object per line, of which an invalid one is left out alone."
                ) from error
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                yield number, error


def _list_items(text: str) -> Iterator[Any]:
    """The items of json.loads(text), one after another; for an invalid item, its error.

    Raises JSONDecodeError as json.loads does if the list itself is invalid.
    """
    # Only finds where an item ends. Numbers too long for Python are left to parse_json.
    decoder, space, place = json.JSONDecoder(parse_int=str), re.compile(r"\s*"), 1

    def skipped(start: int) -> int:
        found = space.match(text, start)
        return found.end() if found else start

    place = skipped(place)
    while not text.startswith("]", place):
        start, (_, place) = place, decoder.raw_decode(text, place)
        try:
            yield parse_json(text[start:place])
        except ValueError as error:
            yield error
        place = skipped(place)
        if text.startswith(",", place):
            place = skipped(place + 1)
            if text.startswith("]", place):
                raise json.JSONDecodeError("Expecting a value after ','", text, place)
        elif not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    if (end := skipped(place + 1)) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, end)
