"""The network against transformers' own, weight for weight, on everything a row can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from saber_jax.data.media import vision_layout
from saber_jax.hf import names
from saber_jax.models import saber
from tests.hf import reference
from tests.models.batches import (
    CONFIG,
    Audio,
    AudioInVideo,
    Conversation,
    Image,
    Text,
    Video,
    conversation,
    pack,
)

LOGITS, GRADIENTS = 5e-6, 1e-5  # Relative to the largest number; float32 noise reaches 2e-6, 6e-6.
BUDGET = {"length": 208, "patches": 304, "chunks": 4}

CASES = {
    "text": [conversation(1, Text(20))],
    "image": [conversation(2, Text(4), Image((1, 12, 20)), Text(7))],
    "images": [conversation(3, Image((1, 8, 8)), Text(2), Image((1, 4, 6)), Text(6))],
    "video": [conversation(4, Text(2), Video((3, 8, 12), 0.5), Text(9))],
    "audio": [conversation(5, Text(3), Audio(337), Text(5))],
    "audio_edges": [conversation(6, Text(2), Audio(201), Text(1), Audio(3), Audio(200), Text(4))],
    "video_then_audio": [conversation(8, Text(3), Video((2, 6, 4)), Audio(250), Text(5))],
    "audio_in_video": [conversation(9, Text(3), AudioInVideo(Video((4, 4, 4)), Audio(300)))],
    "padded": [
        conversation(10, Text(3), Image((1, 6, 8)), Audio(150), Text(5)),
        conversation(11, Text(2), Video((2, 8, 6)), Text(3)),
        conversation(12, Text(9)),
    ],
}


@pytest.fixture(scope="module")
def model():
    return reference.thinker()


@pytest.fixture(scope="module")
def params(model):
    weights = reference.weights(model)
    return names.from_disk(lambda entry: weights[entry.name], CONFIG)


@pytest.fixture(scope="module")
def answers(model):
    return {name: reference.ask(model, talks) for name, talks in CASES.items()}


@jax.jit
def ours(params, batch):
    """Gradients of the summed loss, its terms, and the logits."""

    def loss(params):
        logits = saber.logits(params, saber.hidden(params, batch, CONFIG))
        scores = jax.nn.log_softmax(logits[:, :-1])
        targets = batch["tokens"][:, 1:, None]
        inside = (batch["segments"][:, 1:] > 0) & (
            batch["segments"][:, 1:] == batch["segments"][:, :-1]
        )
        terms = jnp.take_along_axis(scores, targets, axis=2)[..., 0] * inside
        return -terms.sum(), (inside.sum(), logits)

    (total, (count, logits)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return total, count, logits, gradients


@jax.jit
def merged(params, batch):
    model = saber._bind(params, CONFIG, jnp.float32)
    return saber._embed(model, batch, CONFIG, jnp.float32, "none", None)


def row(*talks: Conversation) -> dict:
    return pack([list(talks)], **BUDGET)


def relative(got, want) -> float:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


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
    """The tower with its layers unrolled, stopped after each."""
    from saber_jax.models.positions import vision_rotary
    from saber_jax.models.vision import full_attention, normalize

    cfg, tower = CONFIG.vision, saber._bind(params, CONFIG, jnp.float32).vision
    x = jnp.einsum("BPX,XD->BPD", normalize(batch["patches"]), tower.w_patch[...])
    rotary = vision_rotary(batch["patch_hw"], head_dim=cfg.head_dim)

    def layer(x, inputs):
        block, full = inputs
        segments = jnp.where(full, batch["patch_frame"], batch["patch_window"])
        x = block(x, segments, rotary, eps=cfg.norm_eps, block=None)
        return x, x

    x, layers = jax.lax.scan(layer, x, (tower.blocks, full_attention(cfg)))
    return layers, tower.merger(x, eps=cfg.norm_eps)


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
    rotary = tower._rotary(batch["positions"][:, :, :length], CONFIG.text, jnp.float32)
    visible = packed_text(batch["segments"][:, :length], batch["branch"][:, :length])

    def layer(x, block):
        x, _ = block(x, visible, rotary, eps=CONFIG.text.norm_eps)
        return x, x

    return jax.lax.scan(layer, x, tower.blocks)[1]


def test_every_audio_layer_equals_the_reference(answers, params):
    (talk,) = CASES["audio_edges"]
    layers = answers["audio_edges"].layers
    batch = row(talk)
    got, out = audio_layers(params, batch["mel"], batch["mel_lengths"])
    steps = (batch["mel_lengths"][0] + 1) // 2
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
        x = block(x, visible, eps=cfg.norm_eps)
        return x, x

    x, layers = jax.lax.scan(layer, x, tower.blocks)
    out = tower(mel, lengths, cfg, dtype=jnp.float32)
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
