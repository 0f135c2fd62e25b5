"""The steps: sharing a prefix changes nothing, sharding changes nothing, frozen stays frozen."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saber_jax import sharding
from saber_jax.data.conflicts import CONFLICT_TYPES
from saber_jax.data.examples import common_prefix, encode_record
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.withhold import MODALITIES, VIEWS, withhold
from saber_jax.models import saber
from saber_jax.train import objectives
from saber_jax.train import optimizer as optimizer_lib
from saber_jax.train.losses import means
from saber_jax.train.objectives import (
    Compute,
    cadpo_objective,
    cadpo_probe,
    pair_scores,
    target_log_probs,
)
from saber_jax.train.preference import Preference
from saber_jax.train.step import TrainState, cadpo_step, partition, sft_step
from saber_jax.tree import flatten
from tests import synthetic

COMPUTE = Compute(dtype="float32", remat="none", head_chunk=64, frame_patches=36)
PAIRS = Budget(length=512, response=96, patches=144, chunks=2, targets=256, segments=2)
SHARED = dataclasses.replace(COMPUTE, response=PAIRS.response)
# Half of the patches are a frame and a part of the next.
SINGLE = Budget(length=320, patches=80, chunks=2, targets=128, segments=1)
HEAD = "[video_desc] calm person speaks"
RESPONSES = (
    (f"{HEAD} loudly in the red room", f"{HEAD} slowly"),
    ("[video_desc] red room", "[facial_exp_desc] quiet person in the room"),
)
SECTIONS = f"{HEAD}\n[facial_exp_desc] calm\n[body_lang_desc] quiet"
# The pairs of two rows.
CASES = {
    "two pairs in one row and a row of padding": (RESPONSES, ()),
    "a pair in each of two rows": (RESPONSES[:1], RESPONSES[1:]),
    "unequal lengths": ((("[video_desc] red", f"[video_desc] {'quiet red room ' * 5}"),), ()),
    "empty common prefix": ((), RESPONSES[1:]),
    "identical first sections": (
        (
            (f"{SECTIONS}\n[acoustic_feat] slowly", f"{SECTIONS}\n[acoustic_feat] loudly in red"),
            RESPONSES[0],
        ),
        (),
    ),
    "one response a part of the other": (((HEAD, f"{HEAD} slowly"),), ()),
}


@pytest.fixture(scope="module", autouse=True)
def network_compiled_once():
    """Objectives that are not under jit themselves run op by op around a compiled network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("target_log_probs", "target_nll", "target_entropies"):
            compiled = jax.jit(getattr(objectives, name), static_argnums=(2, 3))
            patch.setattr(objectives, name, compiled)
        yield


@pytest.fixture(scope="module")
def score(cfg):
    """(params, batch) -> log pi of every target."""
    return lambda params, batch: objectives.target_log_probs(params, batch, cfg, SHARED)


def pairs(tokenizer, texts, **about):
    """One encoded pair per (chosen, rejected), with made-up reference log-probs."""
    examples = []
    for i, pair in enumerate(texts):
        example = encode_record(synthetic.record(i), tokenizer, responses=pair, **about)
        examples.append(synthetic.with_references(example, i))
    return examples


@pytest.fixture(scope="module")
def pair_batch(tokenizer):
    return pack_rows([pairs(tokenizer, RESPONSES, ignored="audio"), []], PAIRS)


@pytest.fixture(scope="module")
def forms(cfg):
    """Two jitted functions, each (params, batch) -> ((loss, scores), gradients): the shared form,
    and one that goes through prompt and media for every response again."""

    def shared(params, batch):
        loss, count, sums = cadpo_objective(params, batch, cfg, SHARED, Preference())
        return loss / count, sums

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
    params, tokenizer, forms, score, case
):
    first, second = CASES[case]
    texts = first + second
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
    batch = pack_rows([examples[: len(first)], examples[len(first) :]], PAIRS)
    (loss, sums), grads = shared(params, batch)
    (expected_loss, expected_scores), expected = duplicated(
        params, (pack_rows(rows, SINGLE), references, valid)
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    scores = pair_scores(batch, score(params, batch))
    for got, want in zip((scores.chosen, scores.rejected), expected_scores, strict=True):
        np.testing.assert_allclose(got[batch.pairs.valid], want[valid], rtol=1e-5)
    for name, leaf in flatten(grads).items():
        other = flatten(expected)[name]
        scale = max(float(jnp.abs(other).max()), 1e-6)
        np.testing.assert_allclose(leaf / scale, other / scale, atol=1e-5, err_msg=name)
    assert np.isfinite(jax.tree.leaves(sums)).all()


def test_what_both_responses_begin_with_stands_once(tokenizer):
    counts = {}
    for case, (first, second) in CASES.items():
        batch = pack_rows([pairs(tokenizer, first + second), []], PAIRS)
        real = batch.targets.weights > 0
        counts[case] = np.bincount(batch.targets.branch[real], minlength=3).tolist()
    head, sections = len(tokenizer.encode(HEAD)), len(tokenizer.encode(SECTIONS))
    shared, chosen, rejected = counts["one response a part of the other"]
    assert (shared, chosen) == (head, 1) and rejected > 1  # The end token is not the same.
    assert counts["empty common prefix"][0] == 0
    assert counts["identical first sections"][0] > sections + head
    assert counts["two pairs in one row and a row of padding"][0] == head


# With moments and decay, and yet linear in the gradients, so that rounding stays what it is.
TX = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
STEP_PAIRS = dataclasses.replace(SINGLE, length=256, response=64)
TRAINED = {"sft": ("*",), "cadpo": ("text/*",)}
TOWERS = ("vision/merger/*", "audio/w_out", "audio/b_out")


def rows_of(stage, tokenizer):
    """Four rows of very different sizes, some of them empty: a mean of means would be far off."""
    texts = [RESPONSES[0], RESPONSES[1], CASES["unequal lengths"][0][0]]
    if stage == "cadpo":
        first, second, third = pairs(tokenizer, texts)
        return pack_rows([[first], [second], [third], []], STEP_PAIRS)
    rows = [
        [encode_record(synthetic.record(i), tokenizer, responses=text[1:])]
        for i, text in enumerate(texts)
    ]
    return pack_rows([*rows, []], SINGLE)


def step_of(stage, cfg, *, microbatches=1, mesh=None, one_vector=False):
    compute = dataclasses.replace(
        COMPUTE, microbatches=microbatches, mesh=mesh, one_vector=one_vector
    )
    if stage == "sft":
        return functools.partial(sft_step, cfg=cfg, compute=compute, tx=TX)
    compute = dataclasses.replace(compute, response=STEP_PAIRS.response)
    options = Preference(sft=0.1)
    return functools.partial(cadpo_step, cfg=cfg, compute=compute, tx=TX, options=options)


def state_of(params, patterns=("*",)):
    trainable, frozen = partition(params, patterns)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, TX.init(trainable))


@pytest.fixture(scope="module")
def stepped(cfg, params, tokenizer):
    """A step of each stage on one device, all rows at once."""
    return {
        stage: jax.jit(step_of(stage, cfg))(state_of(params, trained), rows_of(stage, tokenizer))
        for stage, trained in TRAINED.items()
    }


@pytest.mark.parametrize(
    ("stage", "axis", "microbatches"),
    [
        ("sft", "fsdp", 2),
        ("sft", "data", 1),
        ("sft", "sequence", 1),
        ("sft", "tensor", 1),
        ("cadpo", "sequence", 2),
    ],
)
def test_meshes_and_microbatches_change_nothing(
    cfg, params, tokenizer, stepped, stage, axis, microbatches
):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | ({axis: 2} if axis else {})
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[: 2 if axis else 1])
    shardings = saber.shardings(cfg, mesh)
    state = state_of(jax.device_put(params, shardings), TRAINED[stage])
    places = {name: leaf.sharding for name, leaf in state.trainable.items()}
    opt = optimizer_lib.optimizer_shardings(TX, state.trainable, places, mesh)
    placed = dataclasses.replace(
        state,
        step=jax.device_put(state.step, sharding.replicated(mesh)),
        opt_state=jax.device_put(state.opt_state, opt),
    )
    by_hand, one_vector = None if axis == "tensor" else mesh, axis == "data"
    step = step_of(stage, cfg, microbatches=microbatches, mesh=by_hand, one_vector=one_vector)
    rows = rows_of(stage, tokenizer)
    batch = jax.device_put(rows, sharding.batch_shardings(rows, mesh))
    compiled = jax.jit(step).lower(placed, batch).compile()
    got, metrics = compiled(placed, batch)
    expected, expected_metrics = stepped[stage]
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    before = flatten(params)
    for name, leaf in expected.trainable.items():
        moved = np.abs(leaf - before[name]).max()
        np.testing.assert_allclose(
            got.trainable[name], leaf, rtol=1e-6, atol=1e-5 * moved, err_msg=name
        )
        if by_hand is not None:
            assert got.trainable[name].sharding.is_equivalent_to(places[name], leaf.ndim), name
    if one_vector:
        summed = re.findall(r"= (.*) all-reduce\(", compiled.as_text())
        sizes = [int(n) for shapes in summed for n in re.findall(r"f32\[(\d+)[\],]", shapes)]
        assert sorted(sizes)[-1] == sum(leaf.size for leaf in before.values())
        assert max(sorted(sizes)[:-1], default=0) < 100  # Nothing else but metrics.


def test_microbatches_that_do_not_divide_the_rows_are_refused(cfg, params, pair_batch):
    step = step_of("cadpo", cfg, microbatches=3)
    with pytest.raises(ValueError, match=r"batch_rows=2 must be a multiple.*microbatches=3"):
        jax.eval_shape(step, state_of(params), pair_batch)


@pytest.mark.parametrize("patterns", [TRAINED["cadpo"], TOWERS])
def test_frozen_parts_are_bit_identical_and_have_no_moments(
    cfg, params, tokenizer, stepped, patterns
):
    before = state_of(params, patterns)
    if patterns == TRAINED["cadpo"]:
        after, metrics = stepped["cadpo"]
    else:
        after, metrics = jax.jit(step_of("cadpo", cfg))(before, rows_of("cadpo", tokenizer))
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    for name, leaf in before.trainable.items():
        assert (after.trainable[name] != leaf).any(), name
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert len(moments) == len(before.trainable)
    towers = {name.removeprefix("grad_norm/") for name in metrics if name.startswith("grad_norm/")}
    assert towers == {pattern.split("/")[0] for pattern in patterns}


def test_a_pattern_that_matches_nothing_is_refused(params):
    with pytest.raises(
        ValueError, match=r"'txet/\*' matches no parameter.*'audio', 'text', 'vision'"
    ):
        partition(params, ("txet/*",))


@pytest.fixture(scope="module")
def withheld_log_probs(params, tokenizer, score):
    """log pi of every target of RESPONSES, taken from records that were hidden on the host."""

    def of(modality):
        examples = [
            encode_record(withhold(synthetic.record(i), modality), tokenizer, responses=texts)
            for i, texts in enumerate(RESPONSES)
        ]
        return score(params, pack_rows([examples, []], PAIRS))

    return {modality: of(modality) for modality in MODALITIES}


def test_conditional_and_decoupled_terms_score_the_clip_with_the_modality_withheld(
    cfg, params, pair_batch, withheld_log_probs, score
):
    whole = score(params, pair_batch)
    ref = {
        v: pair_scores(pair_batch, pair_batch.targets.reference[:, i]) for i, v in enumerate(VIEWS)
    }
    here = pair_scores(pair_batch, whole)
    without = {m: pair_scores(pair_batch, withheld_log_probs[m]) for m in MODALITIES}
    rho = here - ref["whole"]

    def log_sigmoid_of(z):
        return -jax.nn.log_sigmoid(z)

    def total(**options):
        return float(cadpo_objective(params, pair_batch, cfg, SHARED, Preference(**options))[0])

    want = log_sigmoid_of(0.1 * rho.difference)
    for modality in MODALITIES:
        change = rho.chosen - (without[modality].chosen - ref[modality].chosen)
        want += 0.5 * log_sigmoid_of(0.1 * change)
    got = total(conditional_audio=0.5, conditional_video=0.5)
    assert got == pytest.approx(float(want[0].sum()), rel=1e-5)

    # Both rejected responses ignored audio.
    z = 0.1 * rho.difference + 0.2 * (here.difference - without["video"].difference)
    z -= 0.3 * (here.difference - without["audio"].difference)
    got = total(invariance=0.2, sensitivity=0.3)
    assert got == pytest.approx(float(log_sigmoid_of(z)[0].sum()), rel=1e-5)


def test_length_alpha_discounts_the_longer_response(params, tokenizer, score):
    texts, _ = CASES["unequal lengths"]
    batch = pack_rows([pairs(tokenizer, texts), []], PAIRS)
    log_probs = np.array(score(params, batch))
    got = pair_scores(batch, jnp.array(log_probs), length_alpha=0.25)
    whole = pair_scores(batch, jnp.array(log_probs))
    example = pairs(tokenizer, texts)[0]
    short = len(example.responses[0].tokens)
    assert got.chosen[0, 0] == pytest.approx(float(whole.chosen[0, 0]), rel=1e-6)
    shared = common_prefix(*(r.tokens for r in example.responses))
    rejected = np.concatenate([log_probs[0, :shared], log_probs[0, short:]])
    rejected = rejected[: len(example.responses[1].tokens)]
    want = rejected[:short].sum() + 0.25 * rejected[short:].sum()
    assert got.rejected[0, 0] == pytest.approx(float(want), rel=1e-5)


def with_pairs(batch, **changes):
    return dataclasses.replace(batch, pairs=dataclasses.replace(batch.pairs, **changes))


def metrics_of(params, batch, cfg):
    return means(cadpo_objective(params, batch, cfg, SHARED, Preference())[2])


def test_margins_of_the_sections_add_up_and_absent_types_have_none(cfg, params, pair_batch):
    metrics = metrics_of(params, pair_batch, cfg)
    parts = [metrics[f"margins/{name}"] for name in ("visual", "acoustic", "reasoning")]
    assert float(sum(parts)) == pytest.approx(float(metrics["rewards/margins"]), rel=1e-4)
    assert (
        metrics["margins/sarcasm"] == metrics["rewards/margins"] == metrics["margins/inconsistent"]
    )
    assert np.isnan(metrics["margins/consistent"]) and np.isnan(metrics["margins/masking"])
    assert metrics["kl/chosen"] > 0 and metrics["kl/rejected"] > 0


def test_consistent_and_inconsistent_clips_have_margins_of_their_own(cfg, params, pair_batch):
    agree = pair_batch.pairs.conflict.copy()
    agree[0, 1] = CONFLICT_TYPES.index("none")
    metrics = metrics_of(params, with_pairs(pair_batch, conflict=agree), cfg)
    one, other = (
        metrics_of(params, with_pairs(pair_batch, valid=pair_batch.pairs.valid & only), cfg)
        for only in ([[True, False]], [[False, True]])
    )
    assert metrics["margins/inconsistent"] == metrics["margins/sarcasm"] == one["rewards/margins"]
    assert metrics["margins/consistent"] == metrics["margins/none"] == other["rewards/margins"]
    assert metrics["accuracies/inconsistent"] == one["rewards/accuracies"]
    assert metrics["accuracies/consistent"] == other["rewards/accuracies"]


def test_the_probe_measures_entropy_and_what_each_modality_is_worth(
    cfg, params, pair_batch, withheld_log_probs, score
):
    got = cadpo_probe(params, pair_batch, cfg, SHARED)
    valid = pair_batch.pairs.valid
    chosen = pair_scores(pair_batch, score(params, pair_batch)).chosen
    for modality in MODALITIES:
        blind = pair_scores(pair_batch, withheld_log_probs[modality]).chosen
        want = float((chosen - blind)[valid].mean())
        assert got[f"sensitivity/{modality}"] == pytest.approx(want, abs=2e-4)
        assert abs(want) > 1e-3
    hidden = jax.jit(functools.partial(saber.hidden, cfg=cfg))(params, pair_batch)
    logits = saber.logits(params, hidden)[0, pair_batch.targets.source[0]]
    p = np.asarray(jax.nn.softmax(logits))
    entropies = -(p * np.log(p)).sum(-1)[pair_batch.targets.weights[0] > 0]
    assert got["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-4)
    assert 0 < got["entropy"] < np.log(cfg.text.vocab)
