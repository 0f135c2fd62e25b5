"""The arms of the ablation, and the steps of launch/chain.py that train and evaluate them.

All arms of one seed share its corpus, its stage 1 and its pairs, so that they differ in one thing.
An arm of stage 1 takes as many steps over as many clips as SED. An arm of stage 2 starts from SED
and takes as many steps over as many examples as CA-DPO; they are clips, or pairs, of the split that
pairs are mined from. What arms have in common with a recipe is read from configs/{sft,cadpo}.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks.ablation.transfer import Transfer
from configs import cadpo, sft
from launch import steps as chain
from launch.steps import Step

SFT, CADPO = sft.get_config("tiny"), cadpo.get_config("tiny")
PLAIN = {"loss.sft": 0.0, "loss.anchor": 0.0}
"""The paper's loss: DPO, without the two terms that the tiny recipe adds."""
SIX_SECTIONS = {f"data.tasks.{task}": float(task == "sed") for task in SFT.data.tasks}
"""The one request that pairs answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """`settings` change configs/STAGE.py:tiny; `reads` is the step whose result it trains on, a
    folder of the same name below the seed's. With `from_sed` it starts from SED's weights."""

    says: str
    stage: str
    reads: str
    from_sed: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _more_sft(says: str, peak_lr: float) -> Arm:
    """As many examples a step, for as many steps, as stage 2 takes."""
    taken = CADPO.data
    settings = {
        "data.split": taken.split,
        "data.withhold": taken.withhold,
        "data.wordings": 1,
        "data.first_epochs": 0,
        **SIX_SECTIONS,
        "data.batch_rows": taken.batch_rows,
        "data.batch_examples": taken.batch_examples,
        "data.segments": taken.segments,
        "steps": CADPO.steps,
        **{f"optimizer.{name}": value for name, value in CADPO.optimizer.items()},
        "optimizer.peak_lr": peak_lr,
    }
    return Arm(says=says, stage="sft", reads="records", from_sed=True, settings=settings)


MORE_SFT = ("more_sft", "more_sft_fast")
ARMS = {
    "label_only": Arm(says="SFT on the emotion word alone", stage="sft", reads="records_label"),
    "reason_first": Arm(
        says="SFT on the reasoning, and its evidence after it", stage="sft", reads="records_reason"
    ),
    "sed": Arm(says="SED: evidence first, then the reasoning", stage="sft", reads="records"),
    "more_sft": _more_sft(
        "SED, and as many more SFT steps at the learning rate of stage 2",
        CADPO.optimizer.peak_lr,
    ),
    "more_sft_fast": _more_sft(
        "the same at the learning rate with which stage 1 ends",
        SFT.optimizer.peak_lr * SFT.optimizer.final_fraction,
    ),
    "random": Arm(
        says="SED, then DPO against another clip's annotation",
        stage="cadpo",
        reads="pairs_random",
        from_sed=True,
        settings=PLAIN,
    ),
    "sample": Arm(
        says="SED, then CA-DPO on sampled pairs (the paper's)",
        stage="cadpo",
        reads="pairs_sample",
        from_sed=True,
        settings=PLAIN,
    ),
    "withhold": Arm(
        says="SED, then CA-DPO on pairs by withholding (ours)",
        stage="cadpo",
        reads="pairs",
        from_sed=True,
        settings=PLAIN,
    ),
    "anchored": Arm(
        says="the same with the SFT term and the anchor: the tiny recipe",
        stage="cadpo",
        reads="pairs",
        from_sed=True,
    ),
    "conditional": Arm(
        says="the same with both modality-conditional terms too",
        stage="cadpo",
        reads="pairs",
        from_sed=True,
        settings={"loss.conditional_audio": 0.5, "loss.conditional_video": 0.5},
    ),
}
QUICK = {
    "steps": 4,
    "data.batch_rows": 2,
    "optimizer.vocabulary_steps": 0,
    "optimizer.warmup_steps": 1,
}
"""Of every arm in a --quick run, which shows that the steps work together."""
QUICK_CORPUS = ("--clips", "60")
QUICK_ARMS = ("label_only", "sed")
"""Four steps do not make a model that pairs could be mined from. These two share their compiled
programs, so that a minute is enough."""


def chain_of(
    root: Path,
    seed: int,
    names: Sequence[str],
    *,
    quick: bool = False,
    transfer: Transfer | None = None,
) -> list[Step]:
    """Every step that these arms of one seed need, in order, each once."""
    base = _base(root, seed, quick)
    known = _material(root, seed, base)
    found: dict[str, Step] = {}

    def need(step: Step) -> None:
        for name in step.after:
            need(known[name])
        found.setdefault(step.name, step)

    for name in names:
        train = known["sft"] if name == "sed" else _training(root, seed, name, quick)
        known[train.name] = train
        need(_evaluation(base["evaluate_sft"], root, name, train))
        if transfer:
            need(_elsewhere(base["evaluate_sft"], root, name, train, transfer))
    return list(found.values())


def scores_of(root: Path, name: str) -> Path:
    """Where the scores and predictions of an arm are."""
    usual = {"sed": root / "eval/sft", "anchored": root / "eval/cadpo"}
    return usual.get(name, root / "arms" / name / "eval")


def config_of(root: Path, seed: int, name: str, *, quick: bool = False) -> ConfigDict:
    """The config that trains an arm."""
    config = (sft if ARMS[name].stage == "sft" else cadpo).get_config("tiny")
    config.update_from_flattened_dict(_settings(root, seed, name, quick))
    return config


def _settings(root: Path, seed: int, name: str, quick: bool) -> dict[str, Any]:
    arm = ARMS[name]
    settings = {"root": str(root), **({"seed": seed} if seed else {})}
    if name in ("sed", "anchored"):  # As the tiny chain itself leaves them.
        return settings | (QUICK if quick else {})
    settings |= {"workdir": str(root / "arms" / name)} | dict(arm.settings)
    settings |= QUICK if quick else {}
    if arm.from_sed and arm.stage == "sft":
        settings["init.checkpoint"] = str(root / "sft")
    if arm.reads not in ("records", "pairs"):
        settings["data.path" if arm.stage == "sft" else "data.pairs"] = str(root / arm.reads)
    return settings


def _base(root: Path, seed: int, quick: bool) -> dict[str, Step]:
    """The chain of configs/cadpo.py:tiny, by name."""
    config = cadpo.get_config("tiny")
    settings = {"root": str(root), **({"seed": seed} if seed else {})}
    config.update_from_flattened_dict(settings)
    links = chain.steps(config, "configs/cadpo.py:tiny", _typed(settings))
    base = {step.name: step for step in links}
    if quick:
        corpus = base["corpus"]
        base["corpus"] = dataclasses.replace(corpus, command=(*corpus.command, *QUICK_CORPUS))
        base["sft"] = _training(root, seed, "sed", quick)
    return base


def _training(root: Path, seed: int, name: str, quick: bool) -> Step:
    arm, settings = ARMS[name], _settings(root, seed, name, quick)
    config = config_of(root, seed, name, quick=quick)
    links = chain.steps(config, f"configs/{arm.stage}.py:tiny", _typed(settings))
    train = next(step for step in links if step.leaves == config.workdir)
    after = ("sft", arm.reads) if arm.from_sed else (arm.reads,)
    return dataclasses.replace(train, says=arm.says, after=after)


def _material(root: Path, seed: int, base: Mapping[str, Step]) -> dict[str, Step]:
    """What arms read, by name."""
    sampling = cadpo.get_config("tiny")
    sampling.root, sampling.seed, sampling.mining.method = str(root), seed, "sample"
    sampled = {s.name: s for s in chain.steps(sampling, "configs/cadpo.py:tiny", ())}["pairs"]
    steps = [base[name] for name in ("corpus", "records", "sft", "pairs")]
    steps.append(_aimed(sampled, "pairs_sample", out=root / "pairs_sample"))
    for name, source in (
        ("records_label", "records"),
        ("records_reason", "records"),
        ("pairs_random", "pairs"),
    ):
        out = root / name
        kind = name.partition("_")[2]
        command = (
            *("python", "-m", "benchmarks.ablation.material", kind, "--seed", str(seed)),
            *("--root", str(root), "--out", str(out)),
        )
        says = f"{source} of the ablation: {kind}"
        steps.append(Step(name=name, says=says, command=command, leaves=str(out), after=(source,)))
    return {step.name: step for step in steps}


def _evaluation(evaluate: Step, root: Path, name: str, train: Step) -> Step:
    """`evaluate` is the step that evaluates stage 1."""
    if name == "sed":
        return evaluate
    out = scores_of(root, name)
    step = _aimed(evaluate, f"evaluate_{train.name}", out=out, checkpoint=Path(train.leaves))
    return dataclasses.replace(
        step, says=f"held-out clips: {name}", leaves=str(out / "scores.json"), after=(train.name,)
    )


def _elsewhere(evaluate: Step, root: Path, name: str, train: Step, transfer: Transfer) -> Step:
    """The evaluation of an arm on clips from elsewhere, without probes."""
    out = transfer.scores_of(root, name)
    step = _aimed(
        evaluate,
        f"{out.parent.parent.name}_{out.parent.name}_{name}",
        out=out,
        checkpoint=Path(train.leaves),
        data=transfer.records,
        split=transfer.split,
    )
    return dataclasses.replace(
        step,
        says=f"clips from elsewhere: {name}",
        command=tuple(part for part in step.command if part != "--probes"),
        leaves=str(out / "scores.json"),
        after=(train.name,),
    )


def _aimed(step: Step, name: str, **flags: Path | str) -> Step:
    """The step with other values of some flags of its command."""
    command = list(step.command)
    for flag, value in flags.items():
        command[command.index(f"--{flag}") + 1] = str(value)
    return dataclasses.replace(
        step, name=name, command=tuple(command), share=(), leaves=str(flags["out"])
    )


def _typed(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"--config.{name}={value}" for name, value in settings.items())
