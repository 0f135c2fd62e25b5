"""The pure functions over a params dict, on small batches that hold everything."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax import sharding
from saber_jax.models import saber, text
from saber_jax.models.config import saber_config
from tests.models.batches import (
    CONFIG,
    Audio,
    Image,
    Text,
    Video,
    conversation,
    pack,
    prompts,
    text_batch,
)

BUDGET = {"length": 96, "patches": 112, "chunks": 3}
TALK = conversation(1, Text(3), Image((1, 4, 6)), Video((2, 4, 4)), Audio(230), Text(5))


@pytest.fixture(scope="module")
def params():
    # Biases and norms away from 0 and 1, or their use could not be seen.
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: noise.normal(0, 0.15, leaf.shape).astype(np.float32), saber.abstract(CONFIG)
    )


@pytest.fixture(scope="module")
def batch():
    """A batch of a row with all media and a row of padding."""
    return pack([[TALK], []], **BUDGET)


@functools.partial(jax.jit, static_argnames=("remat", "max_frame_patches", "dtype"))
def hidden(params, batch, **options):
    return saber.hidden(params, batch, CONFIG, **options)


@functools.partial(jax.jit, static_argnames=("remat", "max_frame_patches"))
def gradients(params, batch, **options):
    def loss(params):
        out = saber.hidden(params, batch, CONFIG, **options)
        return jnp.where(batch.text.segments[..., None] > 0, out, 0).std()

    return jax.grad(loss)(params)


def test_init_has_the_abstract_tree():
    drawn = jax.eval_shape(lambda key: saber.init(CONFIG, key), jax.random.key(0))
    saber.check_tree(saber.abstract(CONFIG), drawn)


@pytest.mark.parametrize("name", ["tiny", "3b", "7b"])
def test_every_parameter_names_its_axes_and_every_name_has_a_rule(name):
    config = saber_config(name)
    axes = jax.tree.leaves(saber.axes(config), is_leaf=lambda leaf: isinstance(leaf, tuple))
    shapes = jax.tree.leaves(saber.abstract(config))
    assert [len(names) for names in axes] == [len(leaf.shape) for leaf in shapes]
    assert {name for names in axes for name in names} <= set(sharding.AXIS_RULES)


def test_stacked_layers_are_drawn_independently_and_in_scale():
    # Under jit only what is returned is drawn, so this compiles fast.
    blocks = jax.jit(lambda key: saber.init(CONFIG, key)["text"]["blocks"]["mlp"]["w_up"])
    first, second, _ = blocks(jax.random.key(0))
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    assert first.std() == pytest.approx(CONFIG.text.width**-0.5, rel=0.05)


def test_remat_and_local_attention_change_nothing(params, batch):
    want = gradients(params, batch)
    got = gradients(params, batch, remat="layer", max_frame_patches=24)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-9, err_msg=str(path))


def test_padding_rows_are_finite_in_outputs_and_gradients(params, batch):
    assert np.isfinite(hidden(params, batch)).all()
    got = gradients(params, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_what_stands_in_unused_buffers_changes_nothing(params, batch):
    dirty = jax.tree.map(np.copy, batch)
    unused = batch.vision.frame[0] == 0
    dirty.vision.patches[0, unused] = 255
    dirty.audio.mel[0, 1, 30:] = 9  # The second chunk has 30 frames of sound, the third has none.
    dirty.audio.mel[0, 2] = -9
    used = batch.text.segments[0] > 0
    np.testing.assert_array_equal(hidden(params, batch)[0, used], hidden(params, dirty)[0, used])


def test_no_token_sees_a_later_one_or_the_other_response(params):
    batch = pack([[conversation(3, Text(8))], []], **BUDGET)
    batch.text.branch[0, :10] = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    batch.text.positions[0, :, 7:10] = batch.text.positions[0, :, 4:7]
    base = hidden(params, batch)[0, :10]
    for changed, blind in ((3, [0, 1, 2]), (5, [0, 1, 2, 3, 4, 7, 8, 9]), (8, [*range(8)])):
        other = jax.tree.map(np.copy, batch)
        other.text.tokens[0, changed] += 1
        same = np.isclose(base, hidden(params, other)[0, :10], atol=1e-6).all(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(same), blind)


def test_a_batch_without_media_buffers_needs_no_towers(params):
    small = text_batch(1, 12)
    full = pack([[conversation(0, Text(10))], []], **BUDGET)
    np.testing.assert_allclose(
        hidden(params, small)[0], hidden(params, full)[0, :12], rtol=1e-5, atol=1e-5
    )


def test_packed_prefill_and_decode_equal_one_forward_pass(params):
    talks = [TALK, conversation(2, Text(9), Audio(90), Text(9)), conversation(3, Text(12))]
    whole = hidden(params, pack([[talk] for talk in talks], **BUDGET))
    steps = 4  # The last four tokens of each conversation are taken away and then decoded.
    shorter = [dataclasses.replace(t, **_without_last(t, steps)) for t in talks]
    lengths = np.array([len(talk.tokens) for talk in shorter])
    ends = np.array([[lengths[0], 96 + lengths[1], 96 + lengths[1:].sum()]])
    packed = prompts(pack([[shorter[0]], shorter[1:]], **BUDGET), ends, lengths[None])
    slots = int(lengths.max())

    @jax.jit
    def start(params, batch):
        return saber.prefill(params, batch, CONFIG, prompt_slots=slots, answer_slots=steps)

    step = jax.jit(lambda p, *args: saber.decode(p, *args, CONFIG))
    out, cache = start(params, packed)
    rows = np.arange(len(talks))
    np.testing.assert_allclose(out, whole[rows, lengths - 1], atol=2e-5)
    for offset in range(steps):
        now = lengths + offset
        tokens = np.array([talk.tokens[i] for talk, i in zip(talks, now, strict=True)])
        positions = np.array([talk.positions[0, i] for talk, i in zip(talks, now, strict=True)])
        out, cache = step(
            params, tokens, positions, cache, slots - lengths, offset, lengths * 0 + offset + 1
        )
        np.testing.assert_allclose(out, whole[rows, now], atol=2e-5)


def _without_last(talk, steps: int) -> dict:
    return {"tokens": talk.tokens[:-steps], "positions": talk.positions[:, :-steps]}


def test_the_drawing_of_last_slots():
    rows = jnp.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    got = text.last_slots(rows, jnp.array([[3, 5], [1, 3]]), 2)
    assert got.tolist() == [[2, 3], [4, 5], [6, 6], [7, 8]]


def test_a_cache_without_room_for_an_answer_is_refused(params):
    batch = prompts(text_batch(1, 12), np.array([[12]]), np.array([[12]]))
    with pytest.raises(ValueError, match="got 1 answers of 0"):
        saber.prefill(params, batch, CONFIG, prompt_slots=12, answer_slots=0)


def test_bfloat16_stays_near_float32_and_logits_are_float32(params, batch):
    used = batch.text.segments[0] > 0
    exact, rough = hidden(params, batch), hidden(params, batch, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    scores = [saber.logits(params, states)[0, used] for states in (exact, rough)]
    assert scores[1].dtype == jnp.float32
    error = np.abs(scores[0] - scores[1]).max() / np.abs(scores[0]).max()
    assert 1e-4 < error < 0.1


def test_check_tree_lists_everything_at_once(params):
    wrong = jax.tree.map(lambda leaf: leaf, params)
    wrong["text"]["head"] = wrong["text"].pop("lm_head")
    wrong["text"]["norm"] = jnp.ones(7)
    wrong["audio"]["b_out"] = wrong["audio"]["b_out"].astype(jnp.bfloat16)
    with pytest.raises(ValueError) as error:
        saber.check_tree(saber.abstract(CONFIG), wrong)
    message = str(error.value)
    assert "in 4 places" in message
    assert "missing text/lm_head (48, 120)" in message
    assert "unexpected text/head" in message
    assert "text/norm: expected shape (48,), got (7,)" in message
    assert "audio/b_out: expected float32, got bfloat16" in message


def test_swapped_parameters_never_reach_the_network(params):
    wrong = jax.tree.map(lambda leaf: leaf, params)
    mlp = wrong["text"]["blocks"]["mlp"]
    mlp["w_a"] = mlp.pop("w_up")
    with pytest.raises(ValueError, match="unexpected text/blocks/mlp/w_a"):
        saber.hidden(wrong, text_batch(1, 12), CONFIG)
