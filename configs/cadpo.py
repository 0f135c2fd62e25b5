"""Stage 2, CA-DPO: prefer answers that weigh all modalities, where the modalities conflict.

    launch/tpu_run.sh configs/cadpo.py:tiny         the whole chain, up to an exported model
    launch/tpu_run.sh configs/cadpo.py:7b-v5e-256   on 256 TPU v5e, from the result of stage 1

`tiny` takes 80 steps in a minute. It adds two terms to the paper's form, loss.sft and loss.anchor.
A third of its clips agree, because pairs of conflicting clips alone teach to conclude a conflict
wherever it is asked (docs/ablation.md).

Training starts from the result of configs/sft.py with the same variant, and pairs are mined with
that model. launch/tpu_run.sh makes what is missing.
"""

from ml_collections import ConfigDict

from configs import long_clips, pods, sft


def get_config(variant: str = "7b") -> ConfigDict:
    if variant not in sft.VARIANTS:
        raise ValueError(
            f"configs/cadpo.py has no variant {variant!r}; choose from {sft.VARIANTS}."
        )
    tiny = variant == "tiny"
    c = sft.get_config(variant)
    c.stage = "cadpo"
    root = c.get_ref("root")
    c.workdir = root + "/cadpo"
    if tiny:
        c.steps = 80
    c.epochs = 0 if tiny else 1
    c.init.checkpoint = root + "/sft"

    c.data.split = "preference"
    c.data.pairs = root + "/pairs"
    c.data.withhold = 0.0
    del (
        c.data.tasks,
        c.data.first_tasks,
        c.data.first_epochs,
        c.data.wordings,
        c.data.alone,
    )  # A pair answers the six-section request.
    # A row: [shared prefixes | chosen | rejected], `length` + 2 * `response` slots.
    c.data.batch_rows = 12 if tiny else 48
    c.data.batch_examples = 0 if tiny else 64
    c.data.length = 176 if tiny else 3072
    c.data.response = 80 if tiny else 1_152
    c.data.patches = 72 if tiny else 7_680
    c.data.chunks = 1 if tiny else 10
    c.data.targets = 168 if tiny else 3_584
    c.data.segments = 1 if tiny else 8

    c.mining = mining(tiny)
    c.loss = loss()
    if tiny:
        c.loss.sft = c.loss.anchor = 1.0
    # Where log pi_ref of every pair is kept; python -m saber_jax.reference fills it ahead of time.
    c.reference = root + "/reference"
    c.metrics_every = 20 if tiny else 50  # Steps between metrics that cost three forward passes.

    c.compute.head_chunk = 256
    # The paper's 1e-5 is the learning rate of adapters: 1e-6 times optimizer.adapter_factor.
    c.optimizer.peak_lr = 1e-5 if tiny else 1e-6
    c.optimizer.vocabulary_steps = 0
    c.optimizer.warmup_steps = 10
    c.checkpoint_every = 50
    long_clips.fit(c)
    pods.fit(c)
    return c


def mining(tiny: bool) -> ConfigDict:
    """How launch/tpu_run.sh mines pairs, as flags of python -m data_prep.preferences.

    The paper samples 10 answers per clip at temperature 0.8. The tiny config uses the other method,
    which suits a few hundred clips with labels and needs no judge.
    """
    c = ConfigDict()
    c.method = "withhold" if tiny else "sample"
    # Whether clips whose modalities agree give pairs too. The paper mines conflicting clips alone.
    c.all_clips = tiny
    # Clips answered at a time. With `sample` each has a cache for all of its answers; withholding
    # asks for one answer a clip and takes generation.batch_size.
    c.batch_size = 12 if tiny else 4
    c.samples = 10
    c.temperature = 0.8
    c.margin = 0.1
    c.pairs_per_clip = 1
    c.scorer = "offline"  # offline | judge
    c.judge = ""  # URL of an OpenAI-compatible endpoint; its key comes from SABER_API_KEY.
    c.judge_model = ""
    return c


def loss() -> ConfigDict:
    """The paper's loss. Every option is a term of saber_jax/train/preference.py, with its source;
    docs/cadpo.md describes them. An option that would have no effect is an error."""
    c = ConfigDict()
    c.beta = 0.1
    c.form = "sigmoid"  # sigmoid | robust | ipo | hinge
    c.label_smoothing = 0.0  # Share of pairs whose labels are swapped: cDPO, or rDPO with robust.
    c.margin = 0.0  # m: how far beta * Delta has to be above 0.
    c.conflict_power = 0.0  # A pair counts kappa ** conflict_power.
    c.length_alpha = 1.0  # LD-DPO: weight of tokens beyond the shorter response's length.
    c.sft = 0.0  # RPO: weight of -log pi(chosen) per token.
    c.anchor = 0.0  # mDPO: weight of the term that keeps the chosen response likely.
    c.conditional_audio = 0.0  # OmniDPO: weight of preferring the chosen response with sound ...
    c.conditional_video = 0.0  # ... and with the picture, to without. A forward pass each.
    c.conditional_ignored_only = False  # AVEm-DPO: only for what the rejected response ignored.
    c.invariance = 0.0  # MoD-DPO: to the modality that the rejected response followed ...
    c.sensitivity = 0.0  # ... and to the one that it ignored. Two forward passes.
    c.text_prior = 0.0  # MoD-DPO++: weight of what the reference prefers with nothing to go by.
    # Validation warns where log pi of the chosen answers fell by more nats per token; 0: never.
    c.warn_displacement = 0.5
    return c
