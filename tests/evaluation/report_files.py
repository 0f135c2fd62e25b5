"""A small made-up run as the report reads it: scores, metrics and pairs of two stages."""

from pathlib import Path
from typing import Any

from saber_jax.data import sed
from saber_jax.data.records import FIELDS
from saber_jax.evaluation import probes, saber_test
from saber_jax.runs.files import write_json, write_jsonl

CONFLICT = {"emotion": "contempt", "face": "happy", "voice": "angry", "conflict_type": "sarcasm"}
AGREEMENT = {"emotion": "sad", "face": "sad", "voice": "sad", "conflict_type": "none"}


def prediction(clip_id: str, labels: dict[str, str], said: str) -> dict[str, Any]:
    """An answer that differs from the reference in its conclusion alone."""
    texts = {field: f"{field} of {clip_id} </script><b>" for field in FIELDS}
    response = sed.target_text(texts | {"sentiment_analysis": f"So {said}."})
    return {
        "clip_id": clip_id,
        "language": "zh" if clip_id.endswith("1") else "en",
        "response": response,
        "conclusion": sed.conclusion(response),
        "labels": labels,
        "annotation": texts,
    }


def _predictions(*said: str) -> list[dict[str, Any]]:
    labels = [CONFLICT] * 5 + [AGREEMENT] * 3
    return [prediction(f"clip{i}", labels[i], word) for i, word in enumerate(said)]


SED = _predictions("happy", "happy", "angry", "contempt", "contempt", "sad", "sad", "happy")
CADPO = _predictions("contempt", "contempt", "contempt", "contempt", "angry", "sad", "happy", "sad")


def write_run(root: Path) -> None:
    """Writes a run's files below `root`, and an empty corpus/clips."""
    for stage, rows in (("sft", SED), ("cadpo", CADPO)):
        scores = root / "eval" / stage
        scores.mkdir(parents=True)
        write_jsonl(scores / "predictions.jsonl", rows)
        ratings = [dict.fromkeys(FIELDS, 3.5)] * len(rows)
        about = {"model": "judge-model", "prompts": "1", "orders": 2, "unscored": 0}
        probed = probes.score(rows, {probe: rows for probe in probes.PROBES})
        write_json(
            scores / "scores.json",
            saber_test.score(rows, ratings) | {"judge": about, "probes": probed, "missing": []},
        )
        run = root / stage
        run.mkdir()
        loss = 4.25 if stage == "sft" else 0.6931
        metrics = [
            {
                "step": step,
                "loss": loss / (step + 1),
                "rewards/margins": 0.125 * step,
                "rewards/accuracies": 0.5 + 0.05 * step,
                "seconds": 0.25,
                "margins/visual": 0.1 * step,
                # Only some steps have a pair of this kind.
                **({"margins/sarcasm": 0.2 * step} if step in (2, 5) else {}),
            }
            for step in range(8)
        ]
        write_jsonl(run / "metrics.jsonl", metrics)
        summary = {"stage": stage, "steps": 8, "wall_seconds": 83.4, "unigram_entropy": 4.7333}
        write_json(run / "summary.json", summary | {"parameters": 1508672, "examples": 77})
        write_json(run / "config.json", {"seed": 31337, "optimizer": {"peak_lr": 0.00213}})
    (root / "pairs").mkdir()
    mined = {"pairs": 417, "answers": 1913, "decisions": {"kept": 417, "unparsable": 1496}}
    mined |= {"pairs_by_withheld": {"audio": 205, "video": 212}}
    mined |= {"pairs_by_conflict_type": {"sarcasm": 417}, "pairs_by_language": {"en": 417}}
    write_json(root / "pairs" / "summary.json", mined)
    pair = {
        "clip_id": "clip0",
        "language": "en",
        "chosen": CADPO[0]["response"],
        "rejected": SED[0]["response"],
        "withheld": "audio",
        "conclusion": "contempt",
        "rejected_conclusion": "happy",
        "conflict_type": "sarcasm",
    }
    write_jsonl(root / "pairs" / "pairs.jsonl", [pair, pair | {"clip_id": "clip1"}])
    (root / "corpus" / "clips").mkdir(parents=True)
