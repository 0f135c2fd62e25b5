"""Model FLOPs of a batch, the numerator of MFU.

Counted as in appendix B of PaLM (https://arxiv.org/abs/2204.02311): only matrix products, with two
operations per multiply-add, forward and backward. Only necessary work is counted:

- no padding of text, patches, chunks or targets, and only attention scores that the masks allow
  (half of the square for causal attention);
- all three towers, each over its own positions;
- only gradients that are needed: a frozen tower counts its forward pass, a frozen matrix below a
  trainable one its forward pass and the gradient of its input;
- no rematerialisation.

Axis letters: B rows   L slots   P examples of a row   N patches.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saber_jax.batch import Batch, Branch
from saber_jax.models import lora, saber
from saber_jax.models.config import SaberConfig
from saber_jax.models.parameters import Kind, Part
from saber_jax.tree import flatten

# Dense bfloat16 operations a second of one jax device, by `device_kind`, from the makers' data
# sheets. A TPU7x chip is two devices.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device; None for devices that are not in the table, such as CPUs."""
    return PEAK_FLOPS.get(device_kind)


def counts(batch: Batch) -> dict[str, Float[Array, ""]]:
    """The numbers of tokens, patches, chunks and so on in a batch, without padding.

    `*_pairs` count the (query, key) pairs that attend to each other, not multiplied by heads.
    """
    text, vision, audio = batch.text, batch.vision, batch.audio
    steps = (audio.lengths + 1) // 2
    patches = _sum(vision.frame > 0)
    return {
        "examples": _sum(batch.pairs.valid),
        "left_out": _sum(batch.left_out),
        "tokens": _sum(text.segments > 0),
        "text_pairs": _text_pairs(text.segments, text.branch, batch.pairs.valid.shape[1]),
        "targets": _sum(batch.targets.weights > 0),
        "patches": patches,
        "units": patches / 4,
        "window_pairs": _run_pairs(vision.window),
        "frame_pairs": _run_pairs(vision.frame),
        "chunks": _sum(audio.lengths > 0),
        "mel_frames": _sum(audio.lengths),
        "audio_steps": _sum(steps),
        "audio_pairs": _sum(steps.astype(jnp.float32) ** 2),
        "audio_tokens": _sum(steps // 2),
    }


def _sum(x: Array) -> Float[Array, ""]:
    return x.astype(jnp.float32).sum()


def _text_pairs(
    segments: Int[Array, "B L"], branch: Int[Array, "B L"], examples: int
) -> Float[Array, ""]:
    """Causal pairs of a shared prefix of s slots and two answers of c and r slots, which attend to
    the prefix and to themselves but not to each other."""
    member = jax.nn.one_hot(segments - 1, examples)
    shared, chosen, rejected = (
        jnp.einsum("BLP,BL->BP", member, (branch == b).astype(jnp.float32)) for b in Branch
    )
    both = chosen + rejected
    return (_triangle(shared) + _triangle(chosen) + _triangle(rejected) + shared * both).sum()


def _triangle(n: Array) -> Array:
    return n * (n + 1) / 2


def _run_pairs(labels: Int[Array, "B N"]) -> Float[Array, ""]:
    """Sum of the squared lengths of runs of equal labels, 0 left out.

    The k-th position of a run contributes 2 k + 1, and 1 + 3 + 5 + ... is a square: unlike a
    histogram this needs no scatter.
    """
    place = jnp.arange(labels.shape[1])[None, :]
    fresh = jnp.concatenate([jnp.ones_like(labels[:, :1]), jnp.diff(labels, axis=1)], axis=1) != 0
    start = jax.lax.cummax(jnp.where(fresh, place, 0), axis=1)
    return _sum(jnp.where(labels > 0, 2 * (place - start) + 1, 0))


def train_flops(
    cfg: SaberConfig,
    sizes: Mapping[str, int],
    trainable: Iterable[str],
    counted: Mapping[str, float],
) -> dict[str, float]:
    """FLOPs of one step by tower, over all devices.

    `sizes` maps every parameter's flattened name to how many numbers it has, `trainable` names
    those with a gradient, `counted` is `counts` of the batch.
    """
    trainable = frozenset(trainable)
    result = {}
    below = False
    # Gradients flow from the text tower into both others.
    for tower in ("vision", "audio", "text"):
        flows = below if tower == "text" else False
        total = 0.0
        for part, kinds in _parts(cfg, tower):
            trains = any(name in trainable for name in kinds)
            # The gradient of a single matrix needs no input gradient; in a chain of matrices, all
            # but the first need one.
            alone = not part.layers and list(kinds.values()).count(Kind.MATRIX) <= 1
            input_gradient = flows or (trains and not alone)
            for name, kind in kinds.items():
                if kind.multiplies:
                    passes = 1 + input_gradient + (name in trainable)
                    total += 2 * sizes[name] * counted[part.positions.value] * passes
            if part.layers:
                total += _attention(cfg, tower, counted) * (3 if input_gradient else 1)
            flows = flows or trains
        result[tower] = total
        below = below or flows
    return result


@functools.lru_cache(maxsize=32)
def _parts(cfg: SaberConfig, tower: str) -> list[tuple[Part, dict[str, Kind]]]:
    """The parts of a tower from input to output, with the kind of each parameter by flattened name,
    including adapters. An adapter is applied to the positions of the matrix that it adapts."""
    roles = saber.roles(cfg)
    adapters = roles.get(lora.ADAPTERS, {}).get(tower, {})
    parts: dict[Part, dict[str, Kind]] = {}
    for name, role in flatten({tower: roles[tower], lora.ADAPTERS: {tower: adapters}}).items():
        if role.kind is not Kind.UNREAD:
            parts.setdefault(role.part, {})[name] = role.kind
    return sorted(parts.items(), key=lambda item: item[0].index)


def _attention(cfg: SaberConfig, tower: str, counted: Mapping[str, float]) -> float:
    """Forward FLOPs of attention (scores and weighted values) over all layers."""
    if tower == "text":
        return 4 * cfg.text.layers * cfg.text.heads * cfg.text.head_dim * counted["text_pairs"]
    if tower == "audio":
        return 4 * cfg.audio.layers * cfg.audio.width * counted["audio_pairs"]
    full = len(cfg.vision.full_attention_layers)
    pairs = full * counted["frame_pairs"] + (cfg.vision.depth - full) * counted["window_pairs"]
    return 4 * cfg.vision.width * pairs


def mfu(flops: float, seconds: float, devices: int, device_kind: str) -> float | None:
    """`flops` in `seconds` as a share of the devices' peak; None if the peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None or not seconds > 0 else flops / (seconds * devices * peak)


def parameter_sizes(flat: Mapping[str, Array]) -> dict[str, int]:
    return {name: math.prod(leaf.shape) for name, leaf in flat.items()}
