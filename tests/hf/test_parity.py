"""The network against transformers' own, weight for weight, on everything a row can hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from saber_jax.data.media import vision_layout
from saber_jax.hf import names
from saber_jax.models import saber
from saber_jax.models.config import AudioConfig, SaberConfig, TextConfig, VisionConfig
from tests.hf import reference
from tests.models import weights
from tests.models.batches import (
    CONFIG,
    Audio,
    AudioInVideo,
    Image,
    Text,
    Video,
    conversation,
    pack,
)
from tests.models.cases import CASES, GRADIENTS, LOGITS, PROMPTS, relative, row
from tests.models.gradients import summed_loss_and_gradients as ours
from tests.models.test_golden import GOLDEN

BFLOAT16 = 0.05  # Of the largest logit; see test_bfloat16_is_as_near_to_float32_as_...


@pytest.fixture(scope="module")
def model():
    return reference.thinker()


@pytest.fixture(scope="module")
def params():
    return weights.tree(CONFIG)


@pytest.fixture(scope="module")
def answers(model):
    return {name: reference.ask(model, talks) for name, talks in CASES.items()}


@jax.jit
def merged(params, batch):
    model = saber._bind(params, CONFIG, jnp.float32)
    return saber._embed(model, batch, jnp.float32, "none", None)


@pytest.mark.parametrize("case", CASES)
def test_positions_are_the_reference_ones(answers, case):
    for talk, positions in zip(CASES[case], answers[case].positions, strict=True):
        np.testing.assert_array_equal(talk.positions, positions)


@pytest.mark.parametrize("case", CASES)
def test_merged_embeddings_equal_the_reference(answers, params, case):
    for talk, want in zip(CASES[case], answers[case].embeddings, strict=True):
        assert relative(merged(params, row(talk))[0, : len(talk.tokens)], want) < LOGITS


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_equal_the_reference(answers, params, case):
    answer, loss, tokens, gradients = answers[case], 0.0, 0, None
    for talk, want in zip(CASES[case], answer.logits, strict=True):
        total, count, logits, gradient = ours(params, row(talk))
        assert relative(logits[0, : len(talk.tokens)], want) < LOGITS
        loss, tokens = loss + float(total), tokens + int(count)
        gradients = gradient if gradients is None else jax.tree.map(np.add, gradients, gradient)
    assert abs(loss / tokens - answer.loss) < 2e-6
    disk = {entry.name: array / tokens for entry, array in names.to_disk(gradients, CONFIG)}
    errors = {n: relative(disk[n], want) for n, want in answer.gradients.items() if want.any()}
    assert max(errors.values()) < GRADIENTS, max(errors.items(), key=lambda item: item[1])
    unused = disk.keys() - errors.keys()
    assert all(not disk[name].any() for name in unused), unused


def test_the_committed_goldens_are_what_transformers_says(model, answers):
    with np.load(GOLDEN) as file:
        golden = dict(file)
    for case, answer in answers.items():
        assert abs(golden[f"{case}.loss"] - answer.loss) < 2e-6
        for number, (positions, logits) in enumerate(
            zip(answer.positions, answer.logits, strict=True)
        ):
            np.testing.assert_array_equal(golden[f"{case}.{number}.positions"], positions)
            assert relative(logits, golden[f"{case}.{number}.logits"]) < LOGITS
    np.testing.assert_array_equal(golden["answers"], reference.generate(model, PROMPTS))


def test_bfloat16_is_as_near_to_float32_as_transformers_own(rough, answers, params):
    case = "padded"
    theirs = reference.ask(rough, CASES[case])
    for talk, exact, want in zip(CASES[case], answers[case].logits, theirs.logits, strict=True):
        got = rough_logits(params, row(talk))[0, : len(talk.tokens)]
        assert relative(got, exact) < BFLOAT16
        assert relative(got, exact) < 1.5 * relative(want, exact)


@pytest.fixture(scope="module")
def rough():
    model = reference.thinker()
    for parameter in model.parameters():  # Not the buffers: positions stay float32, as released.
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_of_single_conversations_is_within_what_the_docs_say(rough, answers, params, case):
    """Compares the norms of two errors, because the largest single difference is chance."""
    for talk, exact in zip(CASES[case], answers[case].logits, strict=True):
        (want,) = reference.ask(rough, [talk]).logits
        got = rough_logits(params, row(talk))[0, : len(talk.tokens)]
        assert relative(got, exact) < BFLOAT16
        assert np.linalg.norm(got - exact) < 1.25 * np.linalg.norm(want - exact)


@jax.jit
def rough_logits(params, batch):
    return saber.logits(params, saber.hidden(params, batch, CONFIG, dtype=jnp.bfloat16))


OTHER = SaberConfig(
    text=TextConfig(
        layers=2,
        width=56,
        heads=7,
        kv_heads=1,
        head_dim=32,
        mlp_dim=96,
        vocab=120,
        rope_theta=1e4,
        mrope_section=(4, 6, 6),
        norm_eps=1e-6,
        max_positions=4096,
    ),
    vision=VisionConfig(
        depth=4, width=160, heads=2, mlp_dim=90, out_width=56, full_attention_layers=(1, 3)
    ),
    audio=AudioConfig(layers=3, width=48, heads=3, mlp_dim=64, out_width=56),
    tokens=CONFIG.tokens,
)
"""Other sizes than CONFIG in everything, with the released vision head of 80 features."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 13))
def test_random_conversations_through_random_weights_of_another_size(seed):
    model, params = reference.thinker(OTHER, seed), weights.tree(OTHER, seed)
    rng = np.random.default_rng(seed)
    talks = [random_conversation(rng, woven=seed % 2 == 0) for _ in range(3)]
    answer = reference.ask(model, talks, left=seed % 3 == 0)
    summed, tokens = None, 0
    for talk, positions, want in zip(talks, answer.positions, answer.logits, strict=True):
        np.testing.assert_array_equal(talk.positions, positions)
        batch = pack([[talk]], length=1024, patches=1024, chunks=24)
        _, count, logits, gradients = ours(params, batch, OTHER)
        assert relative(logits[0, : len(talk.tokens)], want) < LOGITS
        summed = gradients if summed is None else jax.tree.map(np.add, summed, gradients)
        tokens += int(count)
    disk = {entry.name: array / tokens for entry, array in names.to_disk(summed, OTHER)}
    for name, want in answer.gradients.items():
        if want.any():
            assert relative(disk[name], want) < GRADIENTS, name


def random_conversation(rng: np.random.Generator, *, woven: bool):
    """One to four media of random sizes between random words."""
    parts = [Text(int(rng.integers(1, 9)))]
    for _ in range(rng.integers(1, 5)):
        grid = tuple(2 * int(side) for side in rng.integers(1, 6, 2))
        seconds = float(rng.choice([1.0, 0.5, 2 / 3, 0.8, 3.0]))
        video = Video((int(rng.integers(1, 6)), *grid), seconds)
        sound = Audio(int(rng.integers(3, 900)))
        moving = AudioInVideo(video, sound) if woven else video
        parts += [
            (Image((1, *grid)), sound, moving)[rng.integers(3)],
            Text(int(rng.integers(1, 9))),
        ]
    return conversation(int(rng.integers(2**31)), *parts)


def test_only_the_audio_markers_are_never_used(answers):
    answer = answers["video_then_audio"]
    unused = names.entries(CONFIG).keys() - answer.gradients.keys()
    assert unused == {"audio_tower.audio_bos_eos_token.weight"}


def test_padding_side_of_the_reference_changes_nothing(model, answers):
    left = reference.ask(model, CASES["padded"], left=True)
    for got, want in zip(left.logits, answers["padded"].logits, strict=True):
        assert relative(got, want) < LOGITS


def test_every_vision_layer_equals_the_reference(answers, params):
    (talk,) = CASES["image"]
    layers, merger = answers["image"].layers["vision"], answers["image"].layers["merger"][0]
    got, units = vision_layers(params, row(talk))
    order = vision_layout((1, 12, 20))
    patches = len(order.order)
    assert len(got) == len(layers) == CONFIG.vision.depth
    for index, want in enumerate(layers):
        assert relative(got[index][0, :patches], want) < LOGITS, f"layer {index}"
    assert relative(units[0, : patches // 4], merger) < LOGITS


@jax.jit
def vision_layers(params, batch):
    """The outputs of the tower after each of its layers, without the scan."""
    from saber_jax.models.positions import vision_rotary
    from saber_jax.models.vision import _attend, full_attention, normalize

    cfg, tower = CONFIG.vision, saber._bind(params, CONFIG, jnp.float32).vision
    x = jnp.einsum("BPX,XD->BPD", normalize(batch.vision.patches), tower.w_patch[...])
    rotary = vision_rotary(batch.vision.hw, head_dim=cfg.head_dim)
    places = {"window": batch.vision.window, "frame": batch.vision.frame}
    attention_fn = functools.partial(_attend, **places, cfg=cfg, reach=None, kernel="xla")

    def layer(x, inputs):
        block, full = inputs
        x = block(x, rotary, functools.partial(attention_fn, full=full))
        return x, x

    x, layers = jax.lax.scan(layer, x, (tower.blocks, full_attention(cfg)))
    return layers, tower.merger(x)


def test_every_text_layer_equals_the_reference(answers, params):
    (talk,) = CASES["video_then_audio"]
    answer = answers["video_then_audio"]
    got = text_layers(params, row(talk), answer.embeddings[0][None])
    assert len(got) == len(answer.layers["text"]) == CONFIG.text.layers
    for index, want in enumerate(answer.layers["text"]):
        assert relative(got[index], want) < LOGITS, f"layer {index}"


@jax.jit
def text_layers(params, batch, x):
    from saber_jax.models.masks import packed_text

    tower, length = saber._bind(params, CONFIG, jnp.float32).text, x.shape[1]
    rotary = tower._rotary(batch.text.positions[:, :, :length], jnp.float32)
    visible = packed_text(batch.text.segments[:, :length], batch.text.branch[:, :length])

    def layer(x, block):
        x, _ = block(x, visible, rotary)
        return x, x

    return jax.lax.scan(layer, x, tower.blocks)[1]


def test_every_audio_layer_equals_the_reference(answers, params):
    (talk,) = CASES["audio_edges"]
    layers = answers["audio_edges"].layers
    batch = row(talk)
    got, out = audio_layers(params, batch.audio.mel, batch.audio.lengths)
    steps = (batch.audio.lengths[0] + 1) // 2
    assert len(got) == len(layers["audio"]) == CONFIG.audio.layers
    for index, want in enumerate(layers["audio"]):
        valid = np.concatenate([got[index][0, c, :n] for c, n in enumerate(steps)])
        assert relative(valid, want.reshape(valid.shape)) < LOGITS, f"layer {index}"
    valid = np.concatenate([out[0, c, : n // 2] for c, n in enumerate(steps)])
    assert relative(valid, layers["audio_out"][0].reshape(valid.shape)) < LOGITS


@jax.jit
def audio_layers(params, mel, lengths):
    from saber_jax.models.layers import gelu
    from saber_jax.models.masks import audio_chunk
    from saber_jax.models.positions import sinusoids

    cfg, tower = CONFIG.audio, saber._bind(params, CONFIG, jnp.float32).audio
    frames = jnp.arange(200)[None, :, None] < lengths[0][:, None, None]
    x = gelu(tower.conv1(mel[0], stride=1)) * frames
    x = gelu(tower.conv2(x, stride=2)) + sinusoids(cfg.n_window, cfg.width)[None]
    visible = audio_chunk((lengths[0] + 1) // 2, cfg.n_window)

    def layer(x, block):
        x = block(x, visible)
        return x, x

    x, layers = jax.lax.scan(layer, x, tower.blocks)
    out = tower(mel, lengths, dtype=jnp.float32)
    return layers[:, None], out.reshape(1, -1, cfg.chunk_tokens, cfg.out_width)


def test_packed_conversations_equal_unpacked_ones(params):
    first = CASES["video_then_audio"][0]
    second = conversation(13, Text(4), Image((1, 4, 6)), Audio(190), Text(3))
    alone = [ours(params, row(talk)) for talk in (first, second)]
    total, count, logits, gradients = ours(params, row(first, second))
    cut = len(first.tokens)
    assert relative(logits[0, :cut], alone[0][2][0, :cut]) < LOGITS
    end = cut + len(second.tokens)
    assert relative(logits[0, cut:end], alone[1][2][0, : end - cut]) < LOGITS
    assert int(count) == int(alone[0][1] + alone[1][1])
    assert abs(float(total - alone[0][0] - alone[1][0])) < 1e-4
    summed = jax.tree.map(np.add, alone[0][3], alone[1][3])
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(summed), strict=True
    ):
        if want.any():
            assert relative(got, want) < GRADIENTS, path
