"""A tiny random thinker made with transformers, and what it says about a conversation."""

import dataclasses

import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from saber_jax.data.media import patchify
from saber_jax.models.config import SaberConfig
from saber_jax.models.vision import PIXEL_MEAN, PIXEL_STD
from tests.models.batches import CONFIG, AudioInVideo, Conversation, Image, Video
from tests.models.cases import NEW_TOKENS
from tests.models.weights import on_disk

TOWERS = {"model.audio_tower.": "audio_tower.", "model.visual.": "visual."}


def thinker(cfg: SaberConfig = CONFIG, seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The reference with the weights of tests/models/weights.py, in float32."""
    torch.set_num_threads(1)
    config = Qwen2_5OmniThinkerConfig(**_config(cfg))
    model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    drawn = on_disk(cfg, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(drawn[disk_name(name)]))
    return model


def _config(cfg: SaberConfig) -> dict:
    text, vision, audio, ids = cfg.text, cfg.vision, cfg.audio, cfg.tokens
    return {
        "pad_token_id": ids.pad,
        "bos_token_id": ids.im_start,
        "eos_token_id": ids.eos,
        "audio_token_index": ids.audio,
        "image_token_index": ids.image,
        "video_token_index": ids.video,
        "audio_start_token_id": ids.audio_bos,
        "audio_end_token_id": ids.audio_eos,
        "vision_start_token_id": ids.vision_bos,
        "vision_end_token_id": ids.vision_eos,
        "position_id_per_seconds": cfg.positions_per_second,
        "seconds_per_chunk": cfg.seconds_per_chunk,
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": text.vocab,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_dim,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.norm_eps,
            "max_position_embeddings": text.max_positions,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "mrope_section": list(text.mrope_section),
                "rope_type": "default",
                "type": "default",
            },
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": vision.depth,
            "hidden_size": vision.width,
            "num_heads": vision.heads,
            "intermediate_size": vision.mlp_dim,
            "out_hidden_size": vision.out_width,
            "fullatt_block_indexes": list(vision.full_attention_layers),
        },
        "audio_config": {
            "d_model": audio.width,
            "encoder_layers": audio.layers,
            "encoder_attention_heads": audio.heads,
            "encoder_ffn_dim": audio.mlp_dim,
            "output_dim": audio.out_width,
        },
    }


def disk_name(name: str) -> str:
    """Name on disk of a parameter in memory, where transformers 5 nests the towers."""
    for ours, disk in {**TOWERS, "model.language_model.": "model."}.items():
        if name.startswith(ours):
            return disk + name.removeprefix(ours)
    return name


def weights(model) -> dict[str, np.ndarray]:
    """Parameters under their names on disk."""
    return {disk_name(n): p.detach().numpy().copy() for n, p in model.named_parameters()}


def inputs(talks: list[Conversation], *, left: bool = False) -> dict:
    """Padded inputs of the reference; media in the order of the rows."""
    length = max(len(talk.tokens) for talk in talks)
    tokens = np.full((len(talks), length), CONFIG.tokens.pad)
    mask = np.zeros_like(tokens)
    for row, talk in enumerate(talks):
        here = np.s_[-len(talk.tokens) :] if left else np.s_[: len(talk.tokens)]
        tokens[row, here], mask[row, here] = talk.tokens, 1
    out = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    shown = [pair for t in talks for pair in zip(t.videos, t.frames, strict=True)]
    for kind, pixels, grid in (
        (Image, "pixel_values", "image_grid_thw"),
        (Video, "pixel_values_videos", "video_grid_thw"),
    ):
        of_kind = [(v, f) for v, f in shown if isinstance(v, kind)]
        if of_kind:
            out[pixels] = torch.cat([_pixels(frames) for _, frames in of_kind])
            out[grid] = torch.tensor([video.grid for video, _ in of_kind])
        if of_kind and kind is Video:
            out["video_second_per_grid"] = torch.tensor([video.seconds for video, _ in of_kind])
    mels = [mel for talk in talks for mel in talk.mels]
    if mels:
        # Garbage behind the sound: nothing may depend on it.
        features = np.full((len(mels), 128, max(map(len, mels)) + 7), -7, np.float32)
        valid = np.zeros((len(mels), features.shape[2]), np.int64)
        for row, mel in enumerate(mels):
            features[row, :, : len(mel)], valid[row, : len(mel)] = mel.T, 1
        out["input_features"] = torch.tensor(features)
        out["feature_attention_mask"] = torch.tensor(valid)
    out["use_audio_in_video"] = any(isinstance(p, AudioInVideo) for t in talks for p in t.parts)
    return out


def _pixels(frames: np.ndarray) -> torch.Tensor:
    """float32 (x - 255 mean) / (255 std), the form of transformers' fast processors."""
    raw = torch.tensor(patchify(frames), dtype=torch.float32).view(-1, 3, 392)
    mean, std = (255 * torch.tensor(values)[None, :, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return ((raw - mean) / std).view(-1, 1176)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the reference computes; `positions`, `logits` and `embeddings` hold one array a row."""

    positions: list[np.ndarray]
    embeddings: list[np.ndarray]
    logits: list[np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]
    layers: dict[str, list[np.ndarray]]


def ask(model, talks: list[Conversation], *, left: bool = False) -> Answer:
    """One forward and backward pass; the loss is the mean over all next tokens of all rows."""
    given = inputs(talks, left=left)
    layers: dict[str, list[np.ndarray]] = {}
    hooks = [
        module.register_forward_hook(_recorder(layers, name)) for name, module in _watched(model)
    ]
    model.zero_grad(set_to_none=True)
    result = model(**given, use_cache=False)
    for hook in hooks:
        hook.remove()
    mask = given["attention_mask"].bool()
    rows = [row[keep] for row, keep in zip(result.logits, mask, strict=True)]
    scores = torch.cat([row[:-1] for row in rows]).float()
    targets = torch.cat([torch.tensor(talk.tokens[1:]) for talk in talks])
    loss = torch.nn.functional.cross_entropy(scores, targets)
    loss.backward()
    embeddings = torch.tensor(layers["embeddings"][0])
    return Answer(
        positions=_positions(model, given, mask),
        embeddings=[row[keep].numpy() for row, keep in zip(embeddings, mask, strict=True)],
        logits=[row.detach().float().numpy() for row in rows],
        loss=loss.item(),
        gradients={
            disk_name(n): p.grad.float().numpy().copy()
            for n, p in model.named_parameters()
            if p.grad is not None
        },
        layers=layers,
    )


def _positions(model, given: dict, mask: torch.Tensor) -> list[np.ndarray]:
    frames = given.get("feature_attention_mask")
    positions, _ = model.get_rope_index(
        given["input_ids"],
        given.get("image_grid_thw"),
        given.get("video_grid_thw"),
        given["attention_mask"],
        given["use_audio_in_video"],
        None if frames is None else frames.sum(-1),
        given.get("video_second_per_grid"),
    )
    return [positions[:, row][:, keep].numpy() for row, keep in enumerate(mask)]


def _watched(model):
    inner = model.model
    yield "embeddings", inner.language_model.layers[0].input_layernorm
    for name, tower in (("vision", inner.visual.blocks), ("audio", inner.audio_tower.layers)):
        for layer in tower:
            yield name, layer
    for layer in inner.language_model.layers:
        yield "text", layer
    yield "merger", inner.visual.merger
    yield "audio_out", inner.audio_tower.proj


def _recorder(layers: dict[str, list[np.ndarray]], name: str):
    def record(module, args, output):
        # The first norm's input is the merged sequence; every other module is asked for its output.
        value = args[0] if name == "embeddings" else output
        value = value[0] if isinstance(value, tuple) else value
        layers.setdefault(name, []).append(value.detach().float().numpy().copy())

    return record


def generate(model, talks: list[Conversation]) -> np.ndarray:
    """Greedy answers of NEW_TOKENS tokens each; end tokens do not end them."""
    given = inputs(talks, left=True)
    with torch.no_grad():
        out = model.generate(
            **given, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
        )
    return out[:, given["input_ids"].shape[1] :].numpy()
