"""The steps: sharing a prefix changes nothing, sharding changes nothing, frozen stays frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saber_jax import sharding
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.transforms import common_prefix, encode_record, size_of
from saber_jax.data.withhold import MODALITIES, VIEWS, withhold
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from saber_jax.train import optimizer as optimizer_lib
from saber_jax.train.losses import means
from saber_jax.train.objectives import (
    Compute,
    cadpo_objective,
    cadpo_probe,
    pair_scores,
    target_log_probs,
    withheld,
)
from saber_jax.train.preference import Preference
from saber_jax.train.step import TrainState, cadpo_step, flatten, merge, partition, sft_step
from tests import synthetic

COMPUTE = Compute(dtype="float32", remat="none", head_chunk=64, frame_patches=36)
PAIRS = Budget(length=512, response=96, patches=144, chunks=2, targets=256, segments=2)
SHARED = dataclasses.replace(COMPUTE, response=PAIRS.response)
SINGLE = Budget(length=320, patches=72, chunks=1, targets=128, segments=1)
HEAD = "[video_desc] calm person speaks"
RESPONSES = (
    (f"{HEAD} loudly in the red room", f"{HEAD} slowly"),
    ("[video_desc] red room", "[facial_exp_desc] quiet person in the room"),
)
SECTIONS = f"{HEAD}\n[facial_exp_desc] calm\n[body_lang_desc] quiet"
CASES = {
    "two pairs in one row": RESPONSES,
    "unequal lengths": (("[video_desc] red", f"[video_desc] {'quiet red room ' * 5}"),),
    "empty common prefix": (RESPONSES[1],),
    "identical first sections": (
        (f"{SECTIONS}\n[acoustic_feat] slowly", f"{SECTIONS}\n[acoustic_feat] loudly in the room"),
        RESPONSES[0],
    ),
    "one shared token of two": ((f"{HEAD}", f"{HEAD} slowly"),),
}


@pytest.fixture(scope="module")
def cfg():
    whole = saber_config("tiny")
    return dataclasses.replace(
        whole,
        text=dataclasses.replace(whole.text, layers=2),
        vision=dataclasses.replace(whole.vision, depth=2, full_attention_layers=(1,)),
    )


@pytest.fixture(scope="module")
def params(cfg):
    return jax.jit(functools.partial(saber.init, cfg))(jax.random.key(0))


def pairs(tokenizer, texts, **about):
    """One encoded pair per (chosen, rejected), with made-up reference log-probs."""
    examples = []
    for i, pair in enumerate(texts):
        example = encode_record(synthetic.record(i), tokenizer, responses=pair, **about)
        reference = np.random.default_rng(i).normal(-5, 2, (len(VIEWS), size_of(example).targets))
        examples.append(dataclasses.replace(example, reference=reference.astype(np.float32)))
    return examples


@pytest.fixture(scope="module")
def pair_batch(tokenizer):
    return pack_rows([pairs(tokenizer, RESPONSES, ignored="audio")], PAIRS)


def alone(tokenizer, index: int, text: str):
    example = encode_record(synthetic.record(index), tokenizer, responses=(text,))
    return pack_rows([[example]], SINGLE)


@pytest.fixture(scope="module")
def score(cfg):
    """Jitted (params, batch) -> log pi of every target."""
    return jax.jit(functools.partial(target_log_probs, cfg=cfg, compute=SHARED))


@pytest.fixture(scope="module")
def objective(cfg):
    """The paper's form, jitted."""
    return jax.jit(
        functools.partial(cadpo_objective, cfg=cfg, compute=SHARED, options=Preference())
    )


@pytest.fixture(scope="module")
def forms(cfg):
    """Two jitted functions, each (params, batch) -> ((loss, scores), gradients): the shared form,
    and one that goes through prompt and media for every response again."""

    def shared(params, batch):
        loss, count, _ = cadpo_objective(params, batch, cfg, SHARED, Preference())
        scores = pair_scores(batch, target_log_probs(params, batch, cfg, SHARED))
        return loss / count, (scores.chosen[0], scores.rejected[0])

    def duplicated(params, batch):
        # Rows are (chosen 0, rejected 0, chosen 1, rejected 1), each a "chosen" of its own.
        rows, references, valid = batch
        sums = target_log_probs(params, rows, cfg, COMPUTE).sum(1)
        rho = sums - references
        loss = -jax.nn.log_sigmoid(0.1 * (rho[0::2] - rho[1::2]))
        return (loss * valid).sum() / valid.sum(), (sums[0::2], sums[1::2])

    return [jax.jit(jax.value_and_grad(form, has_aux=True)) for form in (shared, duplicated)]


@pytest.mark.parametrize("case", CASES)
def test_sharing_a_prefix_changes_no_log_prob_no_loss_and_no_gradient(
    params, tokenizer, forms, case
):
    texts = CASES[case]
    examples = pairs(tokenizer, texts)
    rows, references = [], np.zeros(4, np.float32)
    for i, example in enumerate(examples):
        chosen, rejected = example.responses
        both = common_prefix(chosen.tokens, rejected.tokens)
        log_probs, end = example.reference[0], len(chosen.tokens)
        references[2 * i] = log_probs[:end].sum()
        references[2 * i + 1] = log_probs[:both].sum() + log_probs[end:].sum()
        rows += [
            [encode_record(synthetic.record(i), tokenizer, responses=(text,))] for text in texts[i]
        ]
    valid = np.arange(2) < len(texts)
    rows += [[]] * (4 - len(rows))
    shared, duplicated = forms
    (loss, scores), grads = shared(params, pack_rows([examples], PAIRS))
    (expected_loss, expected_scores), expected = duplicated(
        params, (pack_rows(rows, SINGLE), references, valid)
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for got, want in zip(scores, expected_scores, strict=True):
        np.testing.assert_allclose(got[valid], want[valid], rtol=1e-5)
    for name, leaf in flatten(grads).items():
        other = flatten(expected)[name]
        scale = max(float(jnp.abs(other).max()), 1e-6)
        np.testing.assert_allclose(leaf / scale, other / scale, atol=1e-5, err_msg=name)


def test_rows_and_pairs_of_padding_change_nothing(params, tokenizer, objective):
    examples = pairs(tokenizer, RESPONSES[:1])
    loss, count, tally = objective(params, pack_rows([examples, [], []], PAIRS))
    alone_loss, alone_count, _ = objective(params, pack_rows([examples], PAIRS))
    assert float(loss) == pytest.approx(float(alone_loss), rel=1e-6)
    assert count == alone_count == 1
    assert all(np.isfinite(jax.tree.leaves(tally)))


def state_of(params, tx, patterns=("*",)):
    trainable, frozen = partition(params, patterns)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))


@pytest.mark.parametrize(
    "patterns", [("text/*",), ("vision/merger/*", "audio/w_out", "audio/b_out")]
)
def test_frozen_parts_are_bit_identical_and_have_no_moments(cfg, params, pair_batch, patterns):
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state = state_of(params, tx, patterns)
    before = jax.tree.map(np.asarray, state.frozen)
    step = jax.jit(
        functools.partial(cadpo_step, cfg=cfg, compute=SHARED, tx=tx, options=Preference())
    )
    after, metrics = step(state, pair_batch)
    jax.tree.map(np.testing.assert_array_equal, before, after.frozen)
    for name, leaf in state.trainable.items():
        assert (after.trainable[name] != leaf).any(), name
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(state.trainable)
    towers = {name.removeprefix("grad_norm/") for name in metrics if name.startswith("grad_norm/")}
    assert towers == {pattern.split("/")[0] for pattern in patterns}


def test_a_pattern_that_matches_nothing_is_refused(params):
    with pytest.raises(
        ValueError, match=r"'txet/\*' matches no parameter.*'audio', 'text', 'vision'"
    ):
        partition(params, ("txet/*",))


def test_merge_undoes_flatten(params):
    jax.tree.map(np.testing.assert_array_equal, merge(flatten(params)), params)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_sharded_step_equals_the_step_on_one_device(cfg, params, tokenizer, axis):
    rows = [
        [encode_record(synthetic.record(i), tokenizer, responses=(RESPONSES[i % 2][0],))]
        for i in range(4)
    ]
    batch = pack_rows(rows, SINGLE)
    tx = optax.adamw(1e-3)
    step = functools.partial(sft_step, cfg=cfg, compute=COMPUTE, tx=tx)
    _, expected_metrics = jax.jit(step)(state_of(params, tx), batch)

    mesh = sharding.make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, axis: 2})
    shardings = saber.shardings(cfg, mesh)
    state = state_of(jax.device_put(params, shardings), tx)
    opt = optimizer_lib.optimizer_shardings(tx, state.trainable, flatten(shardings), mesh)
    placed = TrainState(
        jax.device_put(state.step, sharding.replicated(mesh)),
        state.trainable,
        {},
        jax.device_put(state.opt_state, opt),
    )
    compute = dataclasses.replace(COMPUTE, mesh=mesh if axis == "fsdp" else None)
    step = functools.partial(sft_step, cfg=cfg, compute=compute, tx=tx)
    got, metrics = jax.jit(step)(placed, jax.device_put(batch, sharding.batch_sharding(mesh)))
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(expected_metrics["grad_norm"]), rel=1e-5
    )
    for name, place in flatten(shardings).items():
        assert axis == "tensor" or got.trainable[name].sharding.is_equivalent_to(
            place, got.trainable[name].ndim
        ), name


@pytest.mark.parametrize("stage", ["sft", "cadpo"])
def test_microbatches_add_up_to_the_whole_batch(cfg, params, tokenizer, stage):
    # Rows of very different sizes, one of them empty: a mean of means would be far off.
    texts = [RESPONSES[0], RESPONSES[1], CASES["unequal lengths"][0]]
    tx = optax.sgd(0.1)
    if stage == "sft":
        rows = [
            [encode_record(synthetic.record(i), tokenizer, responses=text[1:])]
            for i, text in enumerate(texts)
        ]
        batch, compute, step = pack_rows([*rows, []], SINGLE), COMPUTE, sft_step
    else:
        examples = pairs(tokenizer, texts)
        batch = pack_rows([examples[:2], [], examples[2:], []], PAIRS)
        compute, step = SHARED, functools.partial(cadpo_step, options=Preference(sft=0.1))

    def run(microbatches):
        split = dataclasses.replace(compute, microbatches=microbatches)
        return jax.jit(functools.partial(step, cfg=cfg, compute=split, tx=tx))(
            state_of(params, tx, ("text/*",)), batch
        )

    (whole, expected), (parts, metrics) = run(1), run(2)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, err_msg=name)
    for name, leaf in parts.trainable.items():
        moved = np.abs(whole.trainable[name] - params_at(params, name)).max()
        np.testing.assert_allclose(leaf, whole.trainable[name], atol=1e-5 * moved + 1e-9)


def params_at(params, name):
    return flatten(params)[name]


def test_microbatches_that_do_not_divide_the_rows_are_refused(cfg, params, pair_batch):
    tx = optax.sgd(0.1)
    compute = dataclasses.replace(SHARED, microbatches=2)
    step = functools.partial(cadpo_step, cfg=cfg, compute=compute, tx=tx, options=Preference())
    with pytest.raises(ValueError, match=r"batch_rows=1 must be a multiple.*microbatches=2"):
        jax.eval_shape(step, state_of(params, tx), pair_batch)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_batch_with_a_modality_withheld_is_that_of_its_records(tokenizer, modality):
    def packed(hide):
        examples = []
        for i, texts in enumerate(RESPONSES):
            record = synthetic.record(i, seconds=1.3 + i)
            record = withhold(record, modality) if hide else record
            examples.append(encode_record(record, tokenizer, responses=texts))
        budget = dataclasses.replace(PAIRS, length=640, chunks=4)
        return pack_rows([examples], budget)

    got, want = withheld(packed(False), modality), packed(True)
    heard = np.arange(200)[None, None, :] < want["mel_lengths"][:, :, None]
    np.testing.assert_allclose(got["mel"][heard], want["mel"][heard], atol=1e-6)
    seen = want["patch_frame"] > 0
    np.testing.assert_array_equal(got["patches"][seen], want["patches"][seen])


@pytest.fixture(scope="module")
def withheld_log_probs(params, tokenizer, score):
    """log pi of every target of RESPONSES, taken from records that were hidden on the host."""

    def of(modality):
        examples = [
            encode_record(withhold(synthetic.record(i), modality), tokenizer, responses=texts)
            for i, texts in enumerate(RESPONSES)
        ]
        return score(params, pack_rows([examples], PAIRS))

    return {modality: of(modality) for modality in MODALITIES}


def test_conditional_and_decoupled_terms_score_the_clip_with_the_modality_withheld(
    cfg, params, pair_batch, withheld_log_probs, score
):
    whole = score(params, pair_batch)
    ref = {
        v: pair_scores(pair_batch, pair_batch["target_reference"][:, i])
        for i, v in enumerate(VIEWS)
    }
    here = pair_scores(pair_batch, whole)
    without = {m: pair_scores(pair_batch, withheld_log_probs[m]) for m in MODALITIES}
    rho = here - ref["whole"]

    def log_sigmoid_of(z):
        return -jax.nn.log_sigmoid(z)

    def total(**options):
        objective = functools.partial(
            cadpo_objective, cfg=cfg, compute=SHARED, options=Preference(**options)
        )
        return float(jax.jit(objective)(params, pair_batch)[0])

    want = log_sigmoid_of(0.1 * rho.difference)
    for modality in MODALITIES:
        change = rho.chosen - (without[modality].chosen - ref[modality].chosen)
        want += 0.5 * log_sigmoid_of(0.1 * change)
    got = total(conditional_audio=0.5, conditional_video=0.5)
    assert got == pytest.approx(float(want.sum()), rel=1e-5)

    # Both rejected responses ignored audio.
    z = 0.1 * rho.difference + 0.2 * (here.difference - without["video"].difference)
    z -= 0.3 * (here.difference - without["audio"].difference)
    got = total(invariance=0.2, sensitivity=0.3)
    assert got == pytest.approx(float(log_sigmoid_of(z).sum()), rel=1e-5)


def test_length_alpha_discounts_the_longer_response(params, tokenizer, score):
    batch = pack_rows([pairs(tokenizer, CASES["unequal lengths"])], PAIRS)
    log_probs = np.array(score(params, batch))
    got = pair_scores(batch, jnp.array(log_probs), length_alpha=0.25)
    whole = pair_scores(batch, jnp.array(log_probs))
    example = pairs(tokenizer, CASES["unequal lengths"])[0]
    short = len(example.responses[0].tokens)
    assert got.chosen[0, 0] == pytest.approx(float(whole.chosen[0, 0]), rel=1e-6)
    shared = common_prefix(*(r.tokens for r in example.responses))
    rejected = np.concatenate([log_probs[0, :shared], log_probs[0, short:]])
    rejected = rejected[: len(example.responses[1].tokens)]
    want = rejected[:short].sum() + 0.25 * rejected[short:].sum()
    assert got.rejected[0, 0] == pytest.approx(float(want), rel=1e-5)


def test_margins_of_the_sections_add_up_and_absent_types_have_none(params, pair_batch, objective):
    metrics = means(objective(params, pair_batch)[2])
    parts = [metrics[f"margins/{name}"] for name in ("visual", "acoustic", "reasoning")]
    assert float(sum(parts)) == pytest.approx(float(metrics["rewards/margins"]), rel=1e-5)
    assert (
        metrics["margins/sarcasm"] == metrics["rewards/margins"] == metrics["margins/inconsistent"]
    )
    assert np.isnan(metrics["margins/consistent"]) and np.isnan(metrics["margins/masking"])
    assert metrics["kl/chosen"] > 0 and metrics["kl/rejected"] > 0


def test_the_probe_measures_entropy_and_what_each_modality_is_worth(
    cfg, params, pair_batch, withheld_log_probs, score
):
    got = jax.jit(functools.partial(cadpo_probe, cfg=cfg, compute=SHARED))(params, pair_batch)
    chosen = pair_scores(pair_batch, score(params, pair_batch)).chosen
    for modality in MODALITIES:
        blind = pair_scores(pair_batch, withheld_log_probs[modality]).chosen
        want = float((chosen - blind).mean())
        assert got[f"sensitivity/{modality}"] == pytest.approx(want, abs=2e-4)
        assert abs(want) > 1e-3
    hidden = jax.jit(functools.partial(saber.hidden, cfg=cfg))(params, pair_batch)
    logits = saber.logits(params, hidden)[0, pair_batch["target_source"][0]]
    p = np.asarray(jax.nn.softmax(logits))
    entropies = -(p * np.log(p)).sum(-1)[pair_batch["target_weights"][0] > 0]
    assert got["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-4)
    assert 0 < got["entropy"] < np.log(cfg.text.vocab)
