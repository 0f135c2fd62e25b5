"""The floating-point operations that a batch asks for: model FLOPs, the numerator of MFU.

Counted as in appendix B of PaLM (https://arxiv.org/abs/2204.02311): matrix products alone, two
operations a multiply-add, forward and backward. A share of the peak says little unless the count is
honest, so:

- only what is real counts: no padding of text, patches, chunks or targets, and of attention only
  the scores that the masks let through (half a square where attention is causal);
- all three towers count, each over its own positions;
- a gradient counts where it is needed: a frozen tower costs its forward pass, a frozen matrix below
  something trainable its forward pass and the gradient of its input;
- what rematerialisation computes again does not count.

Axis letters: B rows   L slots   P examples of a row   N patches.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saber_jax.models.config import SaberConfig
from saber_jax.train.step import Batch

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
    """None for devices that the table does not know, CPUs among them: no MFU is better than a
    wrong one."""
    return PEAK_FLOPS.get(device_kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Matrices that a position passes one after another.

    `count` names the positions in `counts`. A `single` product, trained alone, does not need the
    gradient of its input; a chain of them does, but for the first.
    """

    prefixes: tuple[str, ...]
    count: str
    single: bool = False


# From a tower's input to its output. The text tower stands on both others.
PARTS: dict[str, tuple[Part, ...]] = {
    "vision": (
        Part(prefixes=("vision/w_patch",), count="patches", single=True),
        Part(prefixes=("vision/blocks/",), count="patches"),
        Part(prefixes=("vision/merger/",), count="units"),
    ),
    "audio": (
        Part(prefixes=("audio/conv1/",), count="mel_frames", single=True),
        Part(prefixes=("audio/conv2/",), count="audio_steps", single=True),
        Part(prefixes=("audio/blocks/",), count="audio_steps"),
        Part(prefixes=("audio/norm/", "audio/w_out", "audio/b_out"), count="audio_tokens"),
    ),
    "text": (
        Part(prefixes=("text/embed",), count="tokens", single=True),
        Part(prefixes=("text/blocks/",), count="tokens"),
        Part(prefixes=("text/norm",), count="tokens"),
        Part(prefixes=("text/lm_head",), count="targets", single=True),
    ),
}
LOOKED_UP = ("text/embed", "audio/bos_eos")  # Tables, read and not multiplied with.


def counts(batch: Batch) -> dict[str, Float[Array, ""]]:
    """How much of everything a batch holds, padding left out, summed over its rows.

    `*_pairs` are (query, key) pairs that attend to each other, once whatever the number of heads.
    """
    real = batch["segments"] > 0
    steps = (batch["mel_lengths"] + 1) // 2
    patches = _sum(batch["patch_frame"] > 0)
    return {
        "examples": _sum(batch["pair_valid"]),
        "left_out": _sum(batch["left_out"]),
        "tokens": _sum(real),
        "text_pairs": _text_pairs(batch["segments"], batch["branch"], batch["pair_valid"].shape[1]),
        "targets": _sum(batch["target_weights"] > 0),
        "patches": patches,
        "units": patches / 4,
        "window_pairs": _run_pairs(batch["patch_window"]),
        "frame_pairs": _run_pairs(batch["patch_frame"]),
        "chunks": _sum(batch["mel_lengths"] > 0),
        "mel_frames": _sum(batch["mel_lengths"]),
        "audio_steps": _sum(steps),
        "audio_pairs": _sum(steps.astype(jnp.float32) ** 2),
        "audio_tokens": _sum(steps // 2),
    }


def _sum(x: Array) -> Float[Array, ""]:
    return x.astype(jnp.float32).sum()


def _text_pairs(
    segments: Int[Array, "B L"], branch: Int[Array, "B L"], examples: int
) -> Float[Array, ""]:
    """Causal pairs: a shared prefix of s slots, and c and r slots of two answers that see it and
    themselves but not each other."""
    member = jax.nn.one_hot(segments - 1, examples)
    shared, chosen, rejected = (
        jnp.einsum("BLP,BL->BP", member, (branch == b).astype(jnp.float32)) for b in (0, 1, 2)
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
    those with a gradient, `counted` is `counts` of the batch. Raises ValueError for a parameter
    that no part claims: one that is not counted would make MFU quietly too low.
    """
    trainable = frozenset(trainable)
    _claim_all(sizes)
    result = {}
    below = False
    for tower in ("vision", "audio", "text"):
        flows = below if tower == "text" else False
        total = 0.0
        for part in PARTS[tower]:
            names = [n for n in sizes if _base(n).startswith(part.prefixes)]
            trains = any(name in trainable for name in names)
            input_gradient = flows or (trains and not part.single)
            for name in filter(_multiplies, names):
                passes = 1 + input_gradient + (name in trainable)
                total += 2 * sizes[name] * counted[part.count] * passes
            if part.prefixes == (f"{tower}/blocks/",):
                total += _attention(cfg, tower, counted) * (3 if input_gradient else 1)
            flows = flows or trains
        result[tower] = total
        below = below or flows
    return result


def _attention(cfg: SaberConfig, tower: str, counted: Mapping[str, float]) -> float:
    """Forward pass of both products, scores and weighted values, over all layers."""
    if tower == "text":
        return 4 * cfg.text.layers * cfg.text.heads * cfg.text.head_dim * counted["text_pairs"]
    if tower == "audio":
        return 4 * cfg.audio.layers * cfg.audio.width * counted["audio_pairs"]
    full = len(cfg.vision.full_attention_layers)
    pairs = full * counted["frame_pairs"] + (cfg.vision.depth - full) * counted["window_pairs"]
    return 4 * cfg.vision.width * pairs


def _base(name: str) -> str:
    """An adapter works on the positions of the matrix that it adapts."""
    return name.removeprefix("lora/")


def _multiplies(name: str) -> bool:
    """Matrices are named w..., and an adapter's two lie under the name of theirs."""
    if _base(name) in LOOKED_UP:
        return False
    leaf = name.split("/")[-1]
    return name.startswith("lora/") or leaf.startswith("w") or leaf == "lm_head"


def _claim_all(sizes: Mapping[str, int]) -> None:
    prefixes = tuple(p for parts in PARTS.values() for part in parts for p in part.prefixes)
    unknown = [n for n in sizes if not _base(n).startswith((*prefixes, *LOOKED_UP))]
    if unknown:
        raise ValueError(
            f"Nothing in PARTS of {__name__} says over which positions {unknown} are multiplied; "
            "add them there."
        )


def mfu(flops: float, seconds: float, devices: int, device_kind: str) -> float | None:
    """Share of the devices' peak that `flops` in `seconds` is; None where the peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None or not seconds > 0 else flops / (seconds * devices * peak)


def parameter_sizes(flat: Mapping[str, Array]) -> dict[str, int]:
    return {name: math.prod(leaf.shape) for name, leaf in flat.items()}
