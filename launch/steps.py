"""The steps of a config's chain: their commands and outputs, from the corpus to the report.

Stage 2 can be run again with other settings next to an existing one: in its own work directory
(--config.workdir), or as adapters (--config.lora.rank), which get their own automatically. It
starts from the same stage 1 and the same pairs, and its evaluation, export and report are in that
directory. Inputs that you set yourself (data.path, init.checkpoint, data.pairs) are not made: the
steps for them are left out.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import sft
from saber_jax.runs.identity import identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """`after` are the steps whose results this one reads, `leaves` is its output. A step with
    `together` is run by all hosts at once. With several hosts, each first runs `share`, if there is
    one, with --share I/N. `does` are the inputs of the step's result, if these are not its command:
    the step is run again when they change. `rows`, if not 0, are those that a training step
    computes at a time, which processes share where that is faster (processes.py)."""

    name: str
    says: str
    command: tuple[str, ...]
    leaves: str
    after: tuple[str, ...] = ()
    together: bool = False
    share: tuple[str, ...] = ()
    does: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: int = 0


def until(chain: list[Step], name: str) -> list[Step]:
    """The chain up to the step called `name`, all of it for "". Exits when there is no such step.

    The other steps can run on a smaller machine: after training, 63 of 64 hosts would be idle.
    """
    names = [step.name for step in chain]
    if name and name not in names:
        sys.exit(f"launch/tpu_run.sh: --until={name} is no step; there are {', '.join(names)}.")
    return chain[: names.index(name) + 1] if name else chain


def steps(config: ConfigDict, name: str, settings: tuple[str, ...]) -> list[Step]:
    """The whole chain of config `name`, the steps of the config it starts from included.

    `settings` are the `--config.key=value` arguments. They apply to the named stage, except the
    seed, which applies to all steps.
    """
    root, data = Path(config.root), Path(config.data.path)
    config, settings = with_own_workdir(config, settings)
    own_records = _own_records(config)
    chain = [] if own_records or not config.embedded else _embedded_corpus(config, root)
    after = ("records",) if chain else ()
    if "pairs" not in config.data:
        return [*chain, _train(config, name, settings, after)]
    if (start := stage_1(config)) is not None:
        chain.append(_train_stage_1(config, start, after))
    if Path(config.data.pairs) == root / "pairs":
        chain.append(_pairs(config, data))
    stage_2 = _train(config, name, settings, ("sft", "pairs"))
    return [*chain, stage_2, *_results(config, root, data, stage_2.name)]


def with_own_workdir(
    config: ConfigDict, settings: tuple[str, ...]
) -> tuple[ConfigDict, tuple[str, ...]]:
    """With --config.lora.rank=R the work directory is WORKDIR-loraR, because WORKDIR belongs to the
    run that trains all weights."""
    asked = any(setting.startswith("--config.lora.rank=") for setting in settings)
    placed = any(setting.startswith("--config.workdir=") for setting in settings)
    if not asked or placed or not config.lora.rank:
        return config, settings
    config = config.copy_and_resolve_references()
    config.workdir = f"{config.workdir}-lora{config.lora.rank}"
    return config, (*settings, f"--config.workdir={config.workdir}")


MODELS = {"base": "base", "sft": "SED", "cadpo": "CA-DPO"}
STAGES = {
    "sft": "stage 1, SED: evidence first, then the reasoning",
    "cadpo": "stage 2, CA-DPO: prefer the answer that weighs all modalities",
}


STEPS_TO_SHARE = 300  # Each process compiles the step, for longer than fewer steps would save.


def _train(
    config: ConfigDict, name: str, settings: tuple[str, ...], after: tuple[str, ...]
) -> Step:
    root, workdir = Path(config.root), Path(config.workdir)
    place = workdir.relative_to(root) if workdir.is_relative_to(root) else workdir
    rows = config.data.batch_rows // max(config.compute.microbatches, 1)
    return Step(
        # A stage's usual place is ROOT/STAGE; elsewhere it is another step, done beside that one.
        name=config.stage if place == Path(config.stage) else str(place).replace("/", "_"),
        says=STAGES[config.stage],
        command=("python", "-m", "saber_jax.main", f"--config={name}", *settings),
        leaves=config.workdir,
        after=after,
        together=True,
        does=identity(config) | {"workdir": str(place)},
        rows=rows if config.steps is None or config.steps >= STEPS_TO_SHARE else 0,
    )


def _own_records(config: ConfigDict) -> bool:
    return Path(config.data.path) != Path(config.root) / "records"


def stage_1(config: ConfigDict) -> ConfigDict | None:
    """The config of the stage 1 that the chain trains for this stage 2, if it does."""
    if "pairs" not in config.data or Path(config.init.checkpoint) != Path(config.root) / "sft":
        return None
    start = sft.get_config(config.variant)
    start.root, start.seed = config.root, config.seed
    if _own_records(config):
        start.data.path = config.data.path
    return start


def _train_stage_1(config: ConfigDict, start: ConfigDict, after: tuple[str, ...]) -> Step:
    """The step that trains `start`, with the settings that it takes over from stage 2."""
    inherited = [f"--config.root={config.root}"]
    if _own_records(config):
        inherited.append(f"--config.data.path={config.data.path}")
    if config.seed:
        inherited.append(f"--config.seed={config.seed}")
    return _train(start, f"configs/sft.py:{config.variant}", tuple(inherited), after)


def _embedded_corpus(config: ConfigDict, root: Path) -> list[Step]:
    corpus = root / "corpus"
    return [
        Step(
            name="corpus",
            says="the embedded corpus saber_mini: drawn faces, synthetic voices, known conflicts",
            command=(
                *("python", "-m", "data_prep.corpus", "--out", str(corpus)),
                *("--seed", str(config.seed)),
            ),
            leaves=str(corpus),
        ),
        Step(
            name="records",
            says="clips and annotations -> SABER records and a vocabulary",
            command=(
                *("python", "-m", "data_prep.build", "--out", str(root / "records")),
                *("--clips", str(corpus / "clips"), "--annotations", str(corpus / "annotations")),
                *("--labels", str(corpus / "labels.jsonl"), *config.sampling),
            ),
            leaves=str(root / "records"),
            after=("corpus",),
        ),
    ]


def _pairs(config: ConfigDict, data: Path) -> Step:
    command = (
        *("python", "-m", "data_prep.preferences", "--checkpoint", config.init.checkpoint),
        *("--records", str(data), "--split", config.data.split),
        *("--out", config.data.pairs, *_mining(config)),
    )
    says = {
        "withhold": "what the SED model says with one modality withheld, against the target",
        "sample": "the best scored of several answers of the SED model, against the worst",
    }
    return Step(
        name="pairs",
        says=f"preference pairs: {says[config.mining.method]}",
        command=command,
        share=command,
        leaves=config.data.pairs,
        after=("sft",),
    )


def _results(config: ConfigDict, root: Path, data: Path, trained: str) -> list[Step]:
    """Evaluation of both stages, export and report; `trained` is the step of stage 2."""
    usual = Path(config.workdir) == root / "cadpo"
    place, suffix = (root, "") if usual else (Path(config.workdir), f"_{trained}")
    stages = {"sft": config.init.checkpoint, "cadpo": config.workdir}
    scores = {"sft": root / "eval/sft", "cadpo": place / "eval" / "cadpo"}
    names = {"sft": "evaluate_sft", "cadpo": f"evaluate_{trained}"}
    after: dict[str, tuple[str, ...]] = {"sft": ("sft",), "cadpo": (trained,)}
    if base := _base(config):
        stages = {"base": base} | stages
        scores["base"], names["base"], after["base"] = root / "eval/base", "evaluate_base", ()
    evaluations = []
    for stage, checkpoint in stages.items():
        answer = (
            *("python", "-m", "saber_jax.evaluation.run", "--benchmark", "saber_test"),
            *("--checkpoint", checkpoint, "--data", str(data), "--split", "test"),
            *("--out", str(scores[stage]), *_generation(config)),
            *(("--spell_out",) if stage == "base" else ()),
            "--probes",
        )
        evaluations.append(
            Step(
                name=names[stage],
                says=f"answers of the {MODELS[stage]} model to held-out clips, and scores",
                command=(*answer, "--brief"),
                share=answer,
                leaves=str(scores[stage] / "scores.json"),
                after=after[stage],
            )
        )
    export = Step(
        name=f"export{suffix}",
        says="the CA-DPO model as a HuggingFace directory",
        command=(
            *("python", "-m", "saber_jax.hf.export", "--checkpoint", config.workdir),
            *("--out", str(place / "hf"), "--overwrite"),
        ),
        leaves=str(place / "hf"),
        after=(trained,),
    )
    corpus = root / "corpus"
    made_here = ("--corpus", str(corpus)) if config.embedded and data == root / "records" else ()
    mined = Path(config.data.pairs) == root / "pairs"
    report = Step(
        name=f"report{suffix}",
        says="the report, one HTML page",
        command=(
            *("python", "-m", "saber_jax.evaluation.report", "--out", str(place / "report.html")),
            *("--sft", stages["sft"], "--cadpo", stages["cadpo"]),
            *(part for s in stages for part in (f"--{s}_scores", str(scores[s]))),
            *(("--pairs", config.data.pairs) if mined else ()),
            *made_here,
        ),
        leaves=str(place / "report.html"),
        after=tuple(names.values()),
    )
    return [*evaluations, export, report]


def _base(config: ConfigDict) -> str:
    """The starting checkpoint of stage 1, if the chain trains stage 1 and it has one."""
    start = stage_1(config)
    return "" if start is None else start.init.checkpoint


def _mining(config: ConfigDict) -> tuple[str, ...]:
    """Flags of the method; raises SystemExit for settings that mining would refuse hours later."""
    m = config.mining
    for name, known in (("method", ("sample", "withhold")), ("scorer", ("offline", "judge"))):
        if m[name] not in known:
            raise SystemExit(
                f"launch/tpu_run.sh: config.mining.{name} is {m[name]!r}; it is one of {known}."
            )
    if m.method == "sample" and m.scorer == "judge" and not (m.judge and m.judge_model):
        raise SystemExit(
            "launch/tpu_run.sh: config.mining.scorer=judge needs config.mining.judge, the URL of "
            "an OpenAI-compatible endpoint, and config.mining.judge_model. Set both, or "
            "--config.mining.scorer=offline."
        )
    every = ("--all_clips",) if m.all_clips else ()
    if m.method == "withhold":
        return ("--method", m.method, *every, *_generation(config))
    judge = ("--judge", m.judge, "--judge_model", m.judge_model) if m.scorer == "judge" else ()
    return (
        *("--method", m.method, *every, "--batch_size", str(m.batch_size)),
        *("--max_new_tokens", str(config.generation.max_new_tokens), "--seed", str(config.seed)),
        *("--samples", str(m.samples), "--temperature", str(m.temperature)),
        *("--margin", str(m.margin), "--pairs_per_clip", str(m.pairs_per_clip)),
        *("--scorer", m.scorer, *judge),
    )


def _generation(config: ConfigDict) -> tuple[str, ...]:
    g = config.generation
    return ("--batch_size", str(g.batch_size), "--max_new_tokens", str(g.max_new_tokens))
