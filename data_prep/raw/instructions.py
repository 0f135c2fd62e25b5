"""Stage `instructions`: writes a conversation for every clip in the format of ms-swift.

Our own training draws a new request for a clip in every epoch (config.data.tasks, see
saber_jax.data.tasks) and does not need this stage. For other trainers it draws one request per
clip from the same tasks and wordings, with the evidence before the reasoning:

    conversations.jsonl    {"messages": [system, user, assistant], "videos": [...], "audios": [...],
                            "clip_id", "task", "split"}
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from data_prep.raw import storage
from data_prep.raw.shards import Outcome, Row, ShardedStage
from saber_jax.data import annotations, sed
from saber_jax.data.tasks import Mixture, Request

REASONS: dict[str, str] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionSettings:
    """Weights of the tasks, relative to each other, and how many wordings of each are used."""

    tasks: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"sed": 0.7, "visual": 0.1, "acoustic": 0.1, "acoustic_feat": 0.1}
    )
    wordings: int = 4
    seed: int = 0

    def mixture(self) -> Mixture:
        return Mixture(self.tasks, wordings=self.wordings, seed=self.seed)


KEYS = ("clip_id",)


def plan(rows: list[Row], settings: InstructionSettings) -> Callable[[Row], Outcome]:
    """Draws a request for every row; returns a function that adds `request` to a row."""
    mixture = settings.mixture()
    ids = sorted(row["clip_id"] for row in rows)
    drawn = dict(zip(ids, mixture.draw(0, len(ids)).tolist(), strict=True))

    def ask(row: Row) -> Outcome:
        # Test clips get the full request in its first wording.
        test = row["split"] == "test"
        request = Request() if test else mixture.requests[drawn[row["clip_id"]]]
        return {**row, "request": dataclasses.asdict(request)}

    return ask


def conversation(row: Row) -> dict[str, Any]:
    """One line of conversations.jsonl."""
    request = Request(**row["request"])
    fields = annotations.parse_annotation(row["annotation"])
    system, _ = sed.prompt(row["language"])
    # Importers look for relative paths beside conversations.jsonl, or in their own folder.
    file = storage.absolute(row["file"])
    asked = f"<video><audio>{request.instruction(row['language'])}"
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": sed.target_text(fields, request.sections)},
        ],
        "videos": [file],
        "audios": [file],
        "clip_id": row["clip_id"],
        "task": request.task,
        "split": row["split"],
        "language": row["language"],
    }


def write(stage: ShardedStage) -> None:
    """conversations.jsonl of all kept rows."""
    storage.write_lines(
        stage.file("conversations.jsonl"), (conversation(row) for row in stage.rows())
    )
