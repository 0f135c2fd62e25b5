"""Stage `annotate`: asks an OpenAI-compatible endpoint for the six fields of every clip.

A request has pictures, sound and a prompt in the clip's language. The answer has to be SABER JSON
in that language. If it is not, the model is asked once to correct it. Answers with special tokens
or section headings are refused, because those have a meaning in training. An interrupted run does
not repeat requests.

    rows gain    annotation    SABER JSON, as data_prep.build takes it
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterator
from typing import Any

from data_prep.raw import answers, attach, wording
from data_prep.raw.answers import EndpointSettings
from data_prep.raw.shards import Outcome, Row
from data_prep.records.clips import detect_language
from saber_jax.data import annotations, records
from saber_jax.endpoint import Endpoint

REASONS = answers.REASONS

REQUIRED = ("video_desc", "facial_exp_desc", "acoustic_feat", "sentiment_analysis")
"""Fields that must not be empty for a clip with a face and a voice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateSettings:
    endpoint: EndpointSettings = dataclasses.field(default_factory=EndpointSettings)
    clip: attach.AttachSettings = dataclasses.field(default_factory=attach.AttachSettings)
    use_transcript: bool = True  # Tell the annotator what the corpus says was said.

    def of_result(self) -> dict[str, Any]:
        """The settings that affect annotations, for the stage's manifest."""
        return {
            **self.endpoint.of_result(),
            **dataclasses.asdict(self.clip),
            "use_transcript": self.use_transcript,
            "prompts": wording.versions("annotate"),
        }


def work(
    rows: list[Row],
    clients: answers.Clients,
    pool: concurrent.futures.Executor,
    *,
    settings: AnnotateSettings,
) -> Iterator[Outcome]:
    """The stage: rows with their annotation, or dropped with a reason, in order."""
    client = clients["annotate"]
    return answers.each_row(rows, lambda row: _annotated(row, client, settings), pool)


def messages(row: Row, settings: AnnotateSettings) -> list[dict[str, Any]]:
    """The question about one clip. Raises Unanswered("unreadable")."""
    language = row["language"]
    content = attach.parts(row["file"], settings.clip)
    if settings.use_transcript and row["transcript"]:
        heading = wording.TRANSCRIPT[language]
        quoted = wording.data({"transcript": row["transcript"]}, language, heading)
        content.append({"type": "text", "text": quoted})
    return [
        {"role": "system", "content": wording.prompt("annotate", language).text},
        {"role": "user", "content": content},
    ]


def check(value: Any, language: str) -> dict[str, Any]:
    """SABER JSON in `language`, with its keys in the published layout.

    Raises ValueError saying what is wrong, in words that the annotator can act on.
    """
    fields = annotations.parse_annotation(value)
    if empty := [field for field in REQUIRED if not fields[field]]:
        raise ValueError(f'"{empty[0]}" is empty; describe what is there.')
    if (found := detect_language(fields)) != language:
        names = {"en": "English", "zh": "Chinese"}
        raise ValueError(f"the fields are in {names[found]}; write them in {names[language]}.")
    audio = {field: fields[field] for field in records.AUDIO_FIELDS}
    rest = {name: fields[name] for name in records.FIELDS if name not in records.AUDIO_FIELDS}
    return {records.AUDIO_GROUP: audio, **rest}


def _annotated(row: Row, client: Endpoint, settings: AnnotateSettings) -> Row:
    language = row["language"]
    answer = answers.ask_json(
        client,
        messages(row, settings),
        lambda value: check(value, language),
        language=language,
        settings=settings.endpoint.of_request(),
    )
    made = {
        "fields": [f"annotation.{field}" for field in records.FIELDS],
        "tool": "data_prep.annotate",
        "model": answer.model,
        "prompt": wording.prompt("annotate", language).version,
        "parameters": {
            **settings.endpoint.of_request(),
            **dataclasses.asdict(settings.clip),
            "transcript": bool(settings.use_transcript and row["transcript"]),
            "repaired": answer.repaired,
            "tokens": answer.tokens,
        },
    }
    return {**row, "annotation": answer.value, "provenance": [*row["provenance"], made]}
