"""One self-contained HTML page about a run: what was trained, what it scores, what it says.

    python -m saber_jax.evaluation.report --workdir runs/tiny --out runs/tiny/report.html

Every number on the page comes from the run's files or is computed from them here, so the same files
give the same bytes. Nothing is loaded from elsewhere: charts are inline, clips are data: URIs.
"""

import argparse
import base64
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np

from saber_jax.data import sed
from saber_jax.data.journal import read_json, read_jsonl
from saber_jax.data.records import FIELDS
from saber_jax.evaluation import bootstrap, charts, saber_test

MOST_CLIP_BYTES = 2 << 20
FEWEST_EXAMPLES, MOST_EXAMPLES = 6, 8
STAGES = {"sft": "SED", "cadpo": "CA-DPO"}
FIELD_NAMES = {
    "video_desc": "What is seen",
    "facial_exp_desc": "Face",
    "body_lang_desc": "Body",
    "acoustic_feat": "Voice",
    "speech_content": "Words",
    "sentiment_analysis": "Reasoning",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where a run's results lie. Without a corpus the examples have no video."""

    sft: Path
    cadpo: Path
    sft_scores: Path
    cadpo_scores: Path
    pairs: Path
    corpus: Path | None


def render(inputs: Inputs) -> str:
    """The page. Raises FileNotFoundError or ValueError naming what is missing or does not fit."""
    runs = {stage: _run(getattr(inputs, stage)) for stage in STAGES}
    scores = {
        stage: read_json(getattr(inputs, f"{stage}_scores") / "scores.json") for stage in STAGES
    }
    before, after = (
        read_jsonl(getattr(inputs, f"{stage}_scores") / "predictions.jsonl") for stage in STAGES
    )
    if [p["clip_id"] for p in before] != [p["clip_id"] for p in after]:
        raise ValueError(
            f"{inputs.sft_scores} and {inputs.cadpo_scores} hold predictions for different clips. "
            "Evaluate both checkpoints on the same records and split."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "duration": duration}
    return environment.get_template("report.html.j2").render(
        stages=STAGES,
        runs=runs,
        scores=scores,
        rows=score_rows(scores, before, after),
        conflict_types=conflict_rows(scores, before, after),
        charts=_charts(runs),
        mining=read_json(inputs.pairs / "summary.json"),
        examples=[
            _example(kind, old, new, inputs.corpus) for kind, old, new in choose(before, after)
        ],
        field_names=FIELD_NAMES,
    )


def _run(workdir: Path) -> dict[str, Any]:
    """Summary, metrics and settings of one training run."""
    metrics = read_jsonl(workdir / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{workdir}/metrics.jsonl is empty: that run has not taken a step.")
    config = workdir / "config.json"
    return {
        "summary": read_json(workdir / "summary.json"),
        "metrics": metrics,
        "settings": sorted(_flat(read_json(config)).items()) if config.exists() else [],
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        nested = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {prefix + name: value} if nested is None else nested
    return flat


def _charts(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    entropy = runs["sft"]["summary"]["unigram_entropy"]
    unigram = charts.Reference(value=entropy, label=f"unigram entropy {entropy:.3f}")
    wanted = [
        ("sft", "loss", "SED: loss, nats per target token", unigram),
        ("cadpo", "loss", "CA-DPO: loss", None),
        ("cadpo", "rewards/margins", "CA-DPO: reward margin, chosen over rejected", None),
        ("cadpo", "rewards/accuracies", "CA-DPO: share of pairs with a positive margin", None),
    ]
    drawn = []
    for stage, name, title, reference in wanted:
        metrics = runs[stage]["metrics"]
        if name not in metrics[0]:
            raise ValueError(f"The metrics of {stage} have no {name!r}, only {sorted(metrics[0])}.")
        svg = charts.line_chart(
            [(row["step"], row[name]) for row in metrics],
            x_label="step",
            y_label=title,
            reference=reference,
        )
        drawn.append(
            {
                "title": title,
                "svg": markupsafe.Markup(svg),
                "first": f"{metrics[0][name]:.3f}",
                "last": f"{metrics[-1][name]:.3f}",
            }
        )
    return drawn


def score_rows(
    scores: dict[str, Any], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Lines of the main table: name, score of each stage, and the gain over the same clips."""

    def line(name: str, path: tuple[str, ...], gain: dict[str, Any], *, better: int) -> dict:
        values = []
        for stage in STAGES:
            value = scores[stage]
            for key in path:
                value = value[key]
            values.append(value)
        return {"name": name, "values": values, "gain": gain, "better": better}

    agreeing, differing = (
        np.array([saber_test.is_consistent(p["labels"]) is wanted for p in before], bool)
        for wanted in (True, False)
    )

    def gain(labels: tuple[str, ...], which: np.ndarray) -> dict[str, Any]:
        hits = [_follows(predictions, labels)[which] for predictions in (before, after)]
        return bootstrap.paired_gain(*hits)

    either = ("face", "voice")
    inconsistent = ("inconsistent",)
    lines = [
        line(
            "Accuracy, consistent clips",
            ("consistent", "accuracy"),
            gain(("emotion",), agreeing),
            better=1,
        ),
        line(
            "Accuracy, inconsistent clips",
            (*inconsistent, "accuracy"),
            gain(("emotion",), differing),
            better=1,
        ),
        line(
            "Gap between the two",
            ("gap", "accuracy"),
            _plain_gain(scores, "gap", "accuracy"),
            better=-1,
        ),
        line(
            "Unimodal dominance, inconsistent clips",
            (*inconsistent, "dominance"),
            gain(either, differing),
            better=-1,
        ),
    ]
    lines += [
        line(
            f"… following the {label}",
            (*inconsistent, f"follows_{label}"),
            gain((label,), differing),
            better=-1,
        )
        for label in either
    ]
    speech = {"word": "Word error rate, English", "character": "Character error rate, Chinese"}
    for unit, name in speech.items():
        for split in saber_test.SPLITS:
            path = (split, f"{unit}_error_rate")
            if scores["sft"][split][path[1]]["value"] is not None:
                title = f"{name}, {split} clips"
                lines.append(line(title, path, _plain_gain(scores, *path), better=-1))
    return lines


def _plain_gain(scores: dict[str, Any], *path: str) -> dict[str, Any]:
    """Difference of two values that are no means over clips, hence without an interval."""
    values = []
    for stage in STAGES:
        value = scores[stage]
        for key in path:
            value = value[key]
        values.append(value["value"])
    known = None not in values
    return {"value": values[1] - values[0] if known else None, "interval": None}


def conflict_rows(
    scores: dict[str, Any], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Accuracy of both stages by type of conflict, with the gain."""
    rows = []
    for name, first in scores["sft"]["conflict_types"].items():
        which = np.array([p["labels"].get("conflict_type", "unlabelled") == name for p in before])
        hits = [_follows(p, ("emotion",))[which] for p in (before, after)]
        second = scores["cadpo"]["conflict_types"][name]
        gain = bootstrap.paired_gain(*hits)
        rows.append({"name": name, "values": [first, second], "gain": gain, "better": 1})
    return rows


def _follows(predictions: Sequence[dict[str, Any]], labels: tuple[str, ...]) -> np.ndarray:
    return np.array(
        [p["conclusion"] in [p["labels"].get(label, "") for label in labels] for p in predictions],
        bool,
    )


def choose(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(kind, SED answer, CA-DPO answer) of 6 to 8 clips, successes and failures by fixed quotas."""
    quotas = {
        ("inconsistent", False, True): ("Conflict, corrected by CA-DPO", 3),
        ("inconsistent", True, True): ("Conflict, right in both stages", 1),
        ("inconsistent", False, False): ("Conflict, wrong in both stages", 1),
        ("inconsistent", True, False): ("Conflict, lost by CA-DPO", 1),
        ("consistent", True, True): ("No conflict, right in both stages", 1),
        ("consistent", True, False): ("No conflict, lost by CA-DPO", 1),
        ("consistent", False, True): ("No conflict, corrected by CA-DPO", 0),
        ("consistent", False, False): ("No conflict, wrong in both stages", 0),
    }
    groups: dict[tuple, list] = {key: [] for key in quotas}
    for old, new in sorted(zip(before, after, strict=True), key=lambda pair: pair[0]["clip_id"]):
        kind = "consistent" if saber_test.is_consistent(old["labels"]) else "inconsistent"
        groups[kind, _right(old), _right(new)].append((old, new))
    chosen, spare = [], []
    for key, (name, quota) in quotas.items():
        mixed = _alternating([(name, old, new) for old, new in groups[key]])
        chosen += mixed[:quota]
        spare += mixed[quota:]
    chosen += spare[: max(0, FEWEST_EXAMPLES - len(chosen))]
    order = [name for name, _ in quotas.values()]
    return sorted(chosen, key=lambda item: order.index(item[0]))[:MOST_EXAMPLES]


def _alternating(items: list[tuple[str, dict, dict]]) -> list[tuple[str, dict, dict]]:
    """Languages in turn, so that a quota of several shows more than one."""
    seen: dict[str, int] = {}
    turns = []
    for position, item in enumerate(items):
        language = item[1]["language"]
        turns.append((seen.setdefault(language, 0), position, item))
        seen[language] += 1
    return [item for *_, item in sorted(turns, key=lambda turn: turn[:2])]


def _right(prediction: dict[str, Any]) -> bool:
    return prediction["conclusion"] == prediction["labels"]["emotion"]


def _example(
    kind: str, old: dict[str, Any], new: dict[str, Any], corpus: Path | None
) -> dict[str, Any]:
    said = [sed.parse_response(prediction["response"]) for prediction in (old, new)]
    return {
        "kind": kind,
        "clip_id": old["clip_id"],
        "language": old["language"],
        "labels": old["labels"],
        "video": _data_uri(corpus / "clips" / f"{old['clip_id']}.mp4") if corpus else None,
        "conclusions": [
            {
                "stage": name,
                "word": prediction["conclusion"],
                "right": _right(prediction),
                "follows": [
                    label
                    for label in ("face", "voice")
                    if not _right(prediction)
                    and prediction["conclusion"] == prediction["labels"].get(label, "")
                ],
            }
            for name, prediction in zip(STAGES.values(), (old, new), strict=True)
        ],
        "fields": [
            (field, old["annotation"][field], *(s[field] for s in said)) for field in FIELDS
        ],
    }


def _data_uri(path: Path) -> str | None:
    """The clip inside the page, or None if it is too large for that."""
    if path.stat().st_size > MOST_CLIP_BYTES:
        return None
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def percent(value: float | None) -> str:
    """0.4167 -> "41.7"."""
    return "–" if value is None else _signed(f"{100 * value:.1f}")


def points(value: float | None) -> str:
    """A difference of fractions in percentage points, always with its sign."""
    return "–" if value is None else _signed(f"{100 * value:+.1f}")


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """1665.4 -> "27 min 45 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    shown = f"{hours} h " if hours else ""
    return f"{shown}{minutes} min {rest} s" if hours or minutes else f"{rest} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the report of a run.")
    parser.add_argument("--out", required=True, type=Path, help="the .html file to write")
    parser.add_argument("--workdir", type=Path, help="holds all that is not named otherwise")
    defaults = {
        "sft": "sft",
        "cadpo": "cadpo",
        "sft_scores": "eval/sft",
        "cadpo_scores": "eval/cadpo",
        "pairs": "pairs",
        "corpus": "corpus",
    }
    for name, folder in defaults.items():
        parser.add_argument(f"--{name}", type=Path, help=f"default: WORKDIR/{folder}")
    flags = parser.parse_args(argv)
    paths: dict[str, Any] = {}
    for name, folder in defaults.items():
        path = getattr(flags, name) or (flags.workdir and flags.workdir / folder)
        if path is None and name != "corpus":
            parser.error(f"give --workdir or --{name}")
        paths[name] = path
    if not flags.corpus and paths["corpus"] and not paths["corpus"].is_dir():
        paths["corpus"] = None
    try:
        page = render(Inputs(**paths))
    except (ValueError, FileNotFoundError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = flags.out.with_name(flags.out.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, flags.out)
    print(f"report in {flags.out} ({flags.out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
