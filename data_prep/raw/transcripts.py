"""Stage `transcripts`: compares the annotation's speech_content with a speech recogniser.

The word error rate (for Chinese the character error rate) between the two decides. Sound events in
angle brackets are ignored. The recogniser is a Whisper model from a package (recogniser.py), or a
chat endpoint that takes sound. The stage also writes `disagreements.txt`, sorted by error and
aligned word by word, to help you judge the threshold. It ends with the clips that were not checked.

    rows gain    checks.transcript    heard, errors, words, rate, measure ("wer" or "cer"),
                                      or skipped, saying why nothing was checked
"""

import concurrent.futures
import dataclasses
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal

import jiwer
import numpy as np

from data_prep.raw import answers, attach, recogniser, storage, wording
from data_prep.raw.answers import EndpointSettings
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage
from saber_jax.data import decode, isolation

REASONS = {
    **answers.REASONS,
    "unlike": "the words of the annotation are not the words that are heard",
    "unsaid": "the annotation has words where nobody is heard to speak",
    "unwritten": "words are heard and the annotation has none",
}
MEASURES = {"en": "wer", "zh": "cer"}

_EVENT = re.compile(r"<[^<>]*>|（[^（）]*声）")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranscriptSettings:
    """`recogniser` is "offline", "endpoint" or "none". A clip is dropped if its rate is above
    `most_rate` and it has at least `fewest_errors` errors, because rates of short texts vary."""

    recogniser: Literal["offline", "endpoint", "none"] = "offline"
    most_rate: float = 0.5
    fewest_errors: int = 3
    endpoint: EndpointSettings = dataclasses.field(default_factory=EndpointSettings)

    def __post_init__(self):
        if self.recogniser not in ("offline", "endpoint", "none"):
            raise ValueError(
                f'recogniser must be "offline", "endpoint" or "none", got {self.recogniser!r}.'
            )

    def of_result(self) -> dict[str, Any]:
        """The settings that affect checks, for the stage's manifest."""
        asked = {**self.endpoint.of_result(), "prompts": wording.versions("transcribe")}
        return {
            "recogniser": self.recogniser,
            "most_rate": self.most_rate,
            "fewest_errors": self.fewest_errors,
            **(asked if self.recogniser == "endpoint" else {}),
        }


def words(text: str, language: str) -> list[str]:
    """The units to compare: words without case and punctuation, or characters for Chinese.

    >>> words("Well, <laughs> DON'T go!", "en")
    ['well', "don't", 'go']
    """
    text = unicodedata.normalize("NFKC", _EVENT.sub(" ", text)).lower().replace("’", "'")
    if language == "zh":
        return [c for c in text if c.isalnum()]
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text)
    return [word.strip("'") for word in kept.split() if word.strip("'")]


def compare(written: str, heard: str, language: str) -> dict[str, Any]:
    """Errors between two transcripts, in `words`. The rate is relative to `written`."""
    reference, hypothesis = words(written, language), words(heard, language)
    if not reference:
        errors = len(hypothesis)
    else:
        found = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        errors = found.substitutions + found.deletions + found.insertions
    return {
        "heard": heard,
        "errors": errors,
        "words": len(reference),
        "rate": round(errors / max(1, len(reference)), 4),
        "measure": MEASURES[language],
    }


def verdict(check: dict[str, Any], language: str, settings: TranscriptSettings) -> str | None:
    """Why a clip with this check is dropped, or None."""
    heard = len(words(check["heard"], language))
    if check["errors"] < settings.fewest_errors:
        return None
    if not heard:
        return "unsaid"
    if not check["words"]:
        return "unwritten"
    return "unlike" if check["rate"] > settings.most_rate else None


def offline(rows: list[Row], settings: TranscriptSettings) -> Iterator[Outcome]:
    """The stage without an endpoint; clips that it cannot check are kept, with the reason."""
    for row in rows:
        language = row["language"]
        if settings.recogniser == "none" or language not in recogniser.MODELS:
            why = f"language {language} has no offline recogniser"
            why = 'recogniser = "none"' if settings.recogniser == "none" else why
            yield _with_check(row, {"skipped": f"not checked: {why}"}, {"tool": None})
            continue
        try:
            heard = recogniser.recognise(sound(row["file"]), language)
        except (decode.MediaError, OSError) as error:
            yield Dropped(row=row, reason="unreadable", detail=str(error))
            continue
        yield _decided(row, heard, settings, _made_by(language))


def _made_by(language: str) -> dict[str, Any]:
    return {"tool": "faster-whisper", "model": recogniser.MODELS[language]}


def asked(
    rows: list[Row],
    clients: answers.Clients,
    pool: concurrent.futures.Executor,
    *,
    settings: TranscriptSettings,
) -> Iterator[Outcome]:
    """The stage with a chat endpoint as recogniser, for both languages."""
    client = clients["transcripts"]

    def outcome(row: Row) -> Outcome:
        language = row["language"]
        prompt = wording.prompt("transcribe", language)
        question = [
            {"role": "system", "content": prompt.text},
            {"role": "user", "content": [attach.sound_part(row["file"])]},
        ]
        answer = answers.ask_json(
            client,
            question,
            _check_words,
            language=language,
            settings=settings.endpoint.of_request(),
        )
        made = {"tool": "chat endpoint", "model": answer.model, "prompt": prompt.version}
        return _decided(row, answer.value, settings, made)

    return answers.each_row(rows, outcome, pool)


def _check_words(value: Any) -> str:
    if not isinstance(value.get("words"), str):
        raise ValueError('"words" must hold the words as text.')
    return value["words"]


def _decided(row: Row, heard: str, settings: TranscriptSettings, made: dict[str, Any]) -> Outcome:
    written = row["annotation"]["audio_desc"]["speech_content"]
    check = compare(written, heard, row["language"])
    row = _with_check(row, check, made)
    if reason := verdict(check, row["language"], settings):
        detail = f"{check['errors']} errors in {check['words']} words"
        return Dropped(row=row, reason=reason, detail=detail)
    return row


def _with_check(row: Row, check: dict[str, Any], made: dict[str, Any]) -> Row:
    entry = {"fields": ["checks.transcript"], "model": None, "prompt": None, "parameters": {}}
    checks = {**row.get("checks", {}), "transcript": check}
    return {**row, "checks": checks, "provenance": [*row["provenance"], {**entry, **made}]}


def sound(file: str) -> np.ndarray:
    with storage.local_copy(file) as path:
        return isolation.call(decode.decode_clip, path, decode.FrameSampling(max_frames=2)).audio


MOST_SHOWN = 200


def report(stage: ShardedStage) -> None:
    """Writes disagreements.txt: aligned transcripts, the worst first, then unchecked clips."""
    checked, skipped = [], []
    for row, check in stage.checked("transcript"):
        if "skipped" in check:
            skipped.append(f"{row['clip_id']}  {check['skipped']}")
        elif check["errors"]:
            checked.append((check["rate"], row, check))
    checked.sort(key=lambda entry: (-entry[0], entry[1]["clip_id"]))
    lines = [f"{len(checked)} clips with a difference, worst first; at most {MOST_SHOWN} shown.\n"]
    for rate, row, check in checked[:MOST_SHOWN]:
        written = row["annotation"]["audio_desc"]["speech_content"]
        lines.append(f"{row['clip_id']}  {check['measure']} {rate:.2f}  {row['file']}")
        lines.append(_aligned(written, check["heard"], row["language"]))
    lines.append(f"{len(skipped)} clips were not checked.\n")
    storage.write_text(stage.file("disagreements.txt"), "\n".join(lines + skipped) + "\n")
    if skipped:
        print(f"transcripts: {len(skipped)} clips passed unchecked; disagreements.txt names them")


def _aligned(written: str, heard: str, language: str) -> str:
    reference, hypothesis = words(written, language), words(heard, language)
    if not reference or not hypothesis:
        return f"  written: {' '.join(reference)}\n  heard:   {' '.join(hypothesis)}\n"
    found = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    return jiwer.visualize_alignment(found, show_measures=False, skip_correct=False)
