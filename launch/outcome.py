"""The final output of a chain: results, paths of all outputs, and commands to try next."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.steps import Step
from saber_jax.runs.files import exists, listed, read_json, read_jsonl

# What a step evaluates, by its name after "evaluate_"; any other is a stage 2.
MODELS = {"base": "base model", "sft": "SED"}

# What a line says -> where scores.json has it.
LINES = {
    "right where the modalities agree": ("consistent", "accuracy"),
    "right where they conflict": ("inconsistent", "accuracy"),
    "misled by a single modality": ("inconsistent", "dominance"),
}


def text(chain: Sequence[Step]) -> str:
    """The paragraphs of the final output."""
    paragraphs = [results(scored(chain)), places(chain), commands(chain)]
    return "\n\n".join(["", *(p for p in paragraphs if p)])


def scored(chain: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """{"SED": what its scores.json holds}, of every model that the chain evaluates."""
    found = {}
    for step in chain:
        kind, _, model = step.name.partition("_")
        if kind == "evaluate" and exists(step.leaves):
            found[MODELS.get(model, "CA-DPO")] = read_json(step.leaves)
    return found


def results(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A small table, a column for each model; shares with their 95% intervals."""
    if not scores:
        return ""
    rows = [["held-out clips", *scores]]
    for name, (split, score) in LINES.items():
        values = [each[split][score] for each in scores.values()]
        rows.append([f"{name} (n={values[0]['n']})", *map(_share, values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def places(chain: Sequence[Step]) -> str:
    """The output of each step with its path, the last step first."""
    width = max(len(step.leaves) for step in chain)
    return "\n".join(f"{step.leaves:{width}}  {step.says}" for step in reversed(chain))


def commands(chain: Sequence[Step]) -> str:
    """Three commands to try next."""
    trained = [step.leaves for step in chain if step.together]
    if not trained:
        return ""
    python, checkpoint = _python(), shlex.quote(trained[-1])
    clip = shlex.quote(_clip(chain))
    lines = [
        f"{python} -m saber_jax.generate --checkpoint {checkpoint} --video {clip} --withhold audio",
        f"launch/setup.sh --demo && {python} -m saber_jax.demo --checkpoint {checkpoint}",
    ]
    folder = shlex.quote(str(Path(trained[-1]).parent))
    lines.append(f"{python} -m tensorboard.main --logdir {folder}")
    return "\n".join(["Try next:", *(f"  {line}" for line in lines)])


def _share(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['value']:.0%} ({low:.0%} to {high:.0%})"


def _clip(chain: Sequence[Step]) -> str:
    """A clip that was answered and lies here, or the word CLIP."""
    corpora = [Path(step.leaves) / "clips" for step in chain if step.name == "corpus"]
    answers = [Path(step.leaves).with_name("predictions.jsonl") for step in chain]
    answers = [path for path in answers if exists(path)]
    if corpora and answers:
        name = read_jsonl(answers[-1])[0]["clip_id"]
        if found := listed(corpora[0], f"{name}.*"):
            return str(found[0])
    return "CLIP.mp4"


def _python() -> str:
    """The interpreter as a person would type it here."""
    near = os.path.relpath(sys.executable)
    return sys.executable if near.startswith("..") else near
