"""Makes a self-contained HTML report of a run: settings, curves, scores and answers.

    python -m saber_jax.evaluation.report --workdir runs/tiny --out runs/tiny/report.html

Every number on the page comes from the run's files or is computed from them here. Nothing on it
depends on when or where the run was made, so equal results give equal bytes. Nothing is loaded from
elsewhere: style, script and charts are inline, clips are data: URIs.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from saber_jax.data.conflicts import CONFLICT_TYPES
from saber_jax.evaluation import (
    charts,
    figure,
    published,
    report_examples,
    report_tables,
    saber_test,
)
from saber_jax.flags import Parser
from saber_jax.runs.files import exists, make_folder, read_json, read_jsonl, write_text
from saber_jax.tree import flatten

STAGES = {"base": "Base", "sft": "SED", "cadpo": "CA-DPO"}
TRAINED = ("sft", "cadpo")
"""The stages with a run of their own; the base model is where the first begins."""
PAGE = Path(__file__).parent / "page"
MOST_MEDIA = 24 << 20

# Settings about paths and machines, which do not affect results, are not shown.
LOCATIONS = ("root", "workdir", "mesh", "checkpoint_every", "init.checkpoint")
LOCATIONS += ("data.path", "data.pairs", "data.threads", "data.workers")

SPLITS = tuple(saber_test.SPLITS)
HELD_OUT = ("accuracy", "length_balanced_accuracy", "longer_wins")


def _kind(prefix: str, names: Sequence[str], *, among: bool) -> Callable[[str], bool]:
    """Whether a metric is PREFIX/NAME with NAME among `names`, or not among them."""

    def belongs(metric: str) -> bool:
        first, _, name = metric.partition("/")
        return first == prefix and (name in names) == among

    return belongs


# Title of a chart -> which metrics it shows.
CURVES: dict[str, Callable[[str], bool]] = {
    "loss": lambda name: name == "loss",
    "loss by section": _kind("nll", (), among=False),
    "held-out loss by section": lambda name: name.startswith("validate/nll/"),
    "share of held-out pairs preferred rightly": _kind("validate", HELD_OUT, among=True),
    "reward margin, chosen over rejected": lambda name: name == "rewards/margins",
    "share of pairs with a positive margin": lambda name: name == "rewards/accuracies",
    "share of pairs with a positive margin, by split": _kind("accuracies", SPLITS, among=True),
    "reward margin by type of conflict": _kind("margins", CONFLICT_TYPES, among=True),
    "reward margin by kind of evidence": _kind("margins", (*CONFLICT_TYPES, *SPLITS), among=False),
    "nats that the chosen answer loses without a modality": _kind("sensitivity", (), among=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The paths of a run's results. `runs` and `scores` are by stage; only the scores of one stage
    are required. `corpus` contains clips/, `others` are scores of more benchmarks by name."""

    runs: Mapping[str, Path]
    scores: Mapping[str, Path]
    pairs: Path | None = None
    corpus: Path | None = None
    others: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    most_media: int = MOST_MEDIA


def render(inputs: Inputs) -> str:
    """The page. Raises FileNotFoundError or ValueError naming what is missing or does not fit."""
    stages = {stage: name for stage, name in STAGES.items() if stage in inputs.scores}
    if not stages:
        raise ValueError(
            "A report needs the scores of at least one stage. `python -m saber_jax.evaluation.run` "
            "with --out WORKDIR/eval/sft or WORKDIR/eval/cadpo makes them; --sft_scores and "
            "--cadpo_scores name other folders."
        )
    runs = {stage: _run(inputs.runs[stage]) for stage in stages if stage in inputs.runs}
    results = report_tables.Results(
        stages=stages,
        scores={stage: read_json(inputs.scores[stage] / "scores.json") for stage in stages},
        rows={stage: read_jsonl(inputs.scores[stage] / "predictions.jsonl") for stage in stages},
    )
    pairs = read_jsonl(inputs.pairs / "pairs.jsonl") if inputs.pairs else []
    clips = inputs.corpus / "clips" if inputs.corpus else None
    browser = report_examples.browser(results, pairs, clips, inputs.most_media)
    cards = report_tables.cards(results)
    drawn = figure.svg(cards, list(stages.values()))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": report_tables.percent,
        "points": report_tables.points,
        "plain": report_tables.plain,
    }
    return environment.get_template("report.html.j2").render(
        stages=stages,
        runs=runs,
        scores=results.scores,
        cards=cards,
        figure=markupsafe.Markup(drawn),
        figure_link=markupsafe.Markup(figure.link(drawn)),
        worse=report_tables.worse(results),
        beside=_beside(inputs, runs, cards),
        summary=report_tables.summary(results),
        missing=report_tables.missing(results),
        outcomes=report_tables.outcomes(results),
        conflict_types=report_tables.conflict_types(results),
        judged=report_tables.judged(results),
        probes=report_tables.probes(results),
        confusions=report_tables.confusions(results),
        charts=_charts(runs),
        mining=read_json(inputs.pairs / "summary.json") if inputs.pairs else None,
        others={
            name: report_tables.flat(read_json(path / "scores.json"))
            for name, path in inputs.others.items()
        },
        browser=browser,
        # A string in it may hold "</script>".
        browser_json=markupsafe.Markup(
            json.dumps(browser, ensure_ascii=False).replace("<", "\\u003c")
        ),
    )


def _beside(
    inputs: Inputs, runs: Mapping[str, dict[str, Any]], cards: Sequence[report_tables.Line]
) -> published.Beside | None:
    """The published ablation, for a run of both stages on the embedded corpus."""
    if not inputs.corpus or set(inputs.scores) != set(TRAINED) or set(runs) != set(TRAINED):
        return None
    return published.beside(cards, {stage: run["config"] for stage, run in runs.items()})


def _run(workdir: Path) -> dict[str, Any]:
    """Summary, metrics and settings of one training run."""
    metrics = read_jsonl(workdir / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{workdir}/metrics.jsonl is empty: that run has not taken a step.")
    path = workdir / "config.json"
    config = read_json(path) if exists(path) else {}
    settings = flatten(config, ".")
    names = ("stage", "variant", "model", "seed")
    stage, variant, model, seed = (settings.get(name) for name in names)
    return {
        "about": f"configs/{stage}.py:{variant}, model {model}, seed {seed}" if stage else "",
        "summary": read_json(workdir / "summary.json"),
        "metrics": metrics,
        "config": config,
        # Validation has lines of its own.
        "losses": [row["loss"] for row in metrics if "loss" in row],
        "settings": sorted(
            (key, value)
            for key, value in settings.items()
            if not any(key == name or key.startswith(f"{name}.") for name in LOCATIONS)
        ),
    }


def _charts(runs: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every curve that the runs have metrics for."""
    drawn = []
    for stage, run in runs.items():
        # A metric without anything to average is left out of its step.
        names = list(dict.fromkeys(name for row in run["metrics"] for name in row))
        reference = None
        if stage == "sft" and (entropy := run["summary"].get("unigram_entropy")):
            reference = charts.Reference(value=entropy, label=f"unigram entropy {entropy:.3f}")
        shown = []
        for title, belongs in CURVES.items():
            chosen = [name for name in names if belongs(name)]
            curves = {name: _curve(run["metrics"], name) for name in chosen}
            # A breakdown with one part may repeat the whole.
            if not curves or list(curves.values()) in shown:
                continue
            shown.append(list(curves.values()))
            line = reference if title == "loss" else None
            drawn.append(_chart(curves, f"{STAGES[stage]}: {title}", line))
    return drawn


def _curve(metrics: Sequence[dict[str, Any]], name: str) -> list[charts.Point]:
    return [(row["step"], row[name]) for row in metrics if name in row]


def _chart(
    curves: Mapping[str, Sequence[charts.Point]], title: str, reference: charts.Reference | None
) -> dict[str, Any]:
    svg = charts.line_chart(
        curves,
        x_label="step",
        y_label=title,
        reference=reference,
        logarithmic="loss" in title,
    )
    legend = [
        {
            "name": name.split("/")[-1].replace("_", " "),
            "first": report_tables.plain(points[0][1], 3),
            "last": report_tables.plain(points[-1][1], 3),
        }
        for name, points in curves.items()
    ]
    return {"title": title, "svg": markupsafe.Markup(svg), "legend": legend}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    flags = _flags(argv)
    try:
        page = render(_inputs(flags))
        make_folder(flags.out.parent)
        write_text(flags.out, page)
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"report in {flags.out} ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


def _inputs(flags: argparse.Namespace) -> Inputs:
    """The named paths, or else the usual ones under --workdir if they exist."""

    def place(named: Path | None, usual: str) -> Path | None:
        usually = flags.workdir and flags.workdir / usual
        return named or (usually if usually and exists(usually) else None)

    runs = {stage: place(getattr(flags, stage), stage) for stage in TRAINED}
    scores = {stage: place(getattr(flags, f"{stage}_scores"), f"eval/{stage}") for stage in STAGES}
    return Inputs(
        runs={stage: path for stage, path in runs.items() if path},
        scores={stage: path for stage, path in scores.items() if path},
        pairs=place(flags.pairs, "pairs"),
        corpus=place(flags.corpus, "corpus"),
        others={name: Path(path) for name, path in (item.split("=", 1) for item in flags.scores)},
        most_media=flags.most_media_mb << 20,
    )


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="the .html file to write")
    parser.add_argument("--workdir", type=Path, help="folder of all inputs without a flag")
    for stage in TRAINED:
        parser.add_argument(f"--{stage}", type=Path, help=f"default: WORKDIR/{stage}")
    for stage in STAGES:
        parser.add_argument(f"--{stage}_scores", type=Path, help=f"default: WORKDIR/eval/{stage}")
    parser.add_argument("--pairs", type=Path, help="default: WORKDIR/pairs")
    parser.add_argument("--corpus", type=Path, help="holds clips/; default: WORKDIR/corpus")
    parser.add_argument(
        "--scores", nargs="*", default=[], metavar="NAME=DIR", help="of more benchmarks"
    )
    parser.add_argument(
        "--most_media_mb", type=int, default=MOST_MEDIA >> 20, help="of clips in the page"
    )
    flags = parser.parse_args(argv)
    if wrong := [item for item in flags.scores if "=" not in item]:
        parser.error(f"--scores takes NAME=DIR, got {wrong[0]}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
