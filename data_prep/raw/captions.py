"""Stage `captions`: checks the visual fields of the annotation.

A second, independent vision-language model describes the pictures without sound and without the
annotation. A judge then scores for each field how well annotation and description agree. The stage
writes `disagreements.txt`, with the worst clips first and both texts.

    rows gain    checks.caption    scores 1..5 of three fields, contradiction, caption
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterator
from typing import Any

from data_prep.raw import answers, attach, storage, wording
from data_prep.raw.answers import EndpointSettings
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage

REASONS = {
    **answers.REASONS,
    "contradicted": "an independent description of the picture contradicts the annotation",
}
FIELDS = ("video_desc", "facial_exp_desc", "body_lang_desc")
PARTS = ("scene", "face", "body")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """A clip is dropped if any field scores below `least_score`; 3 means one text says more."""

    least_score: int = 3
    caption: EndpointSettings = dataclasses.field(default_factory=EndpointSettings)
    judge: EndpointSettings = dataclasses.field(default_factory=EndpointSettings)
    clip: attach.AttachSettings = dataclasses.field(default_factory=attach.AttachSettings)

    def of_result(self) -> dict[str, Any]:
        """The settings that affect checks, for the stage's manifest."""
        return {
            "least_score": self.least_score,
            "caption": self.caption.of_result(),
            "judge": self.judge.of_result(),
            **dataclasses.asdict(self.clip),
            "prompts": wording.versions("caption", "compare"),
        }


def work(
    rows: list[Row],
    clients: answers.Clients,
    pool: concurrent.futures.Executor,
    *,
    settings: CaptionSettings,
) -> Iterator[Outcome]:
    """The stage; asks the endpoints "caption" and "judge"."""

    def outcome(row: Row) -> Outcome:
        caption = _caption(row, clients, settings)
        score = _score(row, caption.value, clients, settings)
        scores = {field: score.value[field] for field in FIELDS}
        check = {
            **scores,
            "contradiction": score.value["contradiction"],
            "caption": caption.value,
        }
        language = row["language"]
        made = [
            _made("checks.caption.caption", caption.model, "caption", language, settings.caption),
            _made("checks.caption", score.model, "compare", language, settings.judge),
        ]
        checked = {
            **row,
            "checks": {**row.get("checks", {}), "caption": check},
            "provenance": [*row["provenance"], *made],
        }
        worst = min(scores, key=lambda field: scores[field])
        if scores[worst] < settings.least_score:
            detail = f"{worst} {scores[worst]}: {check['contradiction']}"
            return Dropped(row=checked, reason="contradicted", detail=detail)
        return checked

    return answers.each_row(rows, outcome, pool)


def _caption(
    row: Row, clients: answers.Clients, settings: CaptionSettings
) -> answers.Answer[dict[str, str]]:
    language = row["language"]
    pictures = dataclasses.replace(settings.clip, send="frames")
    messages = [
        {"role": "system", "content": wording.prompt("caption", language).text},
        {"role": "user", "content": attach.parts(row["file"], pictures, sound=False)},
    ]
    return answers.ask_json(
        clients["caption"],
        messages,
        _check_caption,
        language=language,
        settings=settings.caption.of_request(),
    )


def _check_caption(value: dict[str, Any]) -> dict[str, str]:
    for part in PARTS:
        if not isinstance(value.get(part), str):
            raise ValueError(f'"{part}" must be there and hold text.')
    return {part: value[part] for part in PARTS}


def _score(
    row: Row, caption: dict[str, str], clients: answers.Clients, settings: CaptionSettings
) -> answers.Answer[dict[str, Any]]:
    language = row["language"]
    first = {field: row["annotation"][field] for field in FIELDS}
    second = dict(zip(FIELDS, (caption[part] for part in PARTS), strict=True))
    messages = [
        {"role": "system", "content": wording.prompt("compare", language).text},
        {"role": "user", "content": wording.data({"first": first, "second": second}, language)},
    ]
    return answers.ask_json(
        clients["judge"],
        messages,
        _check_scores,
        language=language,
        settings=settings.judge.of_request(),
    )


def _check_scores(value: dict[str, Any]) -> dict[str, Any]:
    scores = {}
    for field in FIELDS:
        score = value.get(field)
        if isinstance(score, bool) or not isinstance(score, int) or not 1 <= score <= 5:
            raise ValueError(f'"{field}" must be a whole number from 1 to 5, got {score!r}.')
        scores[field] = score
    return {**scores, "contradiction": str(value.get("contradiction") or "")}


def _made(
    field: str, model: str, prompt: str, language: str, settings: EndpointSettings
) -> dict[str, Any]:
    return {
        "fields": [field],
        "tool": "data_prep.captions",
        "model": model,
        "prompt": wording.prompt(prompt, language).version,
        "parameters": settings.of_request(),
    }


MOST_SHOWN = 200


def report(stage: ShardedStage) -> None:
    """Writes disagreements.txt: the lowest scores first, with annotation and caption."""
    checked = [
        (min(check[field] for field in FIELDS), row, check)
        for row, check in stage.checked("caption")
    ]
    checked.sort(key=lambda entry: (entry[0], entry[1]["clip_id"]))
    lines = [f"{len(checked)} clips, lowest scores first; at most {MOST_SHOWN} shown.\n"]
    for worst, row, check in checked[:MOST_SHOWN]:
        lines.append(f"{row['clip_id']}  {worst}  {check['contradiction']}  {row['file']}")
        for field, part in zip(FIELDS, PARTS, strict=True):
            lines.append(f"  {field} {check[field]}\n    annotation: {row['annotation'][field]}")
            lines.append(f"    caption:    {check['caption'][part]}")
    storage.write_text(stage.file("disagreements.txt"), "\n".join(lines) + "\n")
