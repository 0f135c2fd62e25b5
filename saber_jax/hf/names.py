"""Mapping of parameter names and layouts between HuggingFace checkpoints and ours.

Each row of a table reads: name on disk, path in our tree, layout on disk -> ours. `{i}` counts
layers, which we stack on a leading axis. Export reads the same rows from right to left.

Axis letters: D width   N heads   K kv heads   H head dim   F mlp or merged width   V vocabulary
O width of the text tower   C channels   T frames   P rows and Q columns of a patch   W taps
M input channels of a convolution.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange

from saber_jax.models import saber
from saber_jax.models.config import SaberConfig

VISION = {
    "patch_embed.proj.weight": ("w_patch", "D C T P Q -> (C T P Q) D"),
    "blocks.{i}.norm1.weight": ("blocks/attn_norm", "D -> D"),
    "blocks.{i}.attn.q.weight": ("blocks/attn/w_q", "(N H) D -> D N H"),
    "blocks.{i}.attn.q.bias": ("blocks/attn/b_q", "(N H) -> N H"),
    "blocks.{i}.attn.k.weight": ("blocks/attn/w_k", "(N H) D -> D N H"),
    "blocks.{i}.attn.k.bias": ("blocks/attn/b_k", "(N H) -> N H"),
    "blocks.{i}.attn.v.weight": ("blocks/attn/w_v", "(N H) D -> D N H"),
    "blocks.{i}.attn.v.bias": ("blocks/attn/b_v", "(N H) -> N H"),
    "blocks.{i}.attn.proj.weight": ("blocks/attn/w_o", "D (N H) -> N H D"),
    "blocks.{i}.attn.proj.bias": ("blocks/attn/b_o", "D -> D"),
    "blocks.{i}.norm2.weight": ("blocks/mlp_norm", "D -> D"),
    "blocks.{i}.mlp.gate_proj.weight": ("blocks/mlp/w_gate", "F D -> D F"),
    "blocks.{i}.mlp.gate_proj.bias": ("blocks/mlp/b_gate", "F -> F"),
    "blocks.{i}.mlp.up_proj.weight": ("blocks/mlp/w_up", "F D -> D F"),
    "blocks.{i}.mlp.up_proj.bias": ("blocks/mlp/b_up", "F -> F"),
    "blocks.{i}.mlp.down_proj.weight": ("blocks/mlp/w_down", "D F -> F D"),
    "blocks.{i}.mlp.down_proj.bias": ("blocks/mlp/b_down", "D -> D"),
    "merger.ln_q.weight": ("merger/norm", "D -> D"),
    "merger.mlp.0.weight": ("merger/w_in", "F D -> D F"),
    "merger.mlp.0.bias": ("merger/b_in", "F -> F"),
    "merger.mlp.2.weight": ("merger/w_out", "O F -> F O"),
    "merger.mlp.2.bias": ("merger/b_out", "O -> O"),
}

AUDIO = {
    "conv1.weight": ("conv1/w", "D M W -> W M D"),
    "conv1.bias": ("conv1/b", "D -> D"),
    "conv2.weight": ("conv2/w", "D M W -> W M D"),
    "conv2.bias": ("conv2/b", "D -> D"),
    "layers.{i}.self_attn_layer_norm.weight": ("blocks/attn_norm/scale", "D -> D"),
    "layers.{i}.self_attn_layer_norm.bias": ("blocks/attn_norm/bias", "D -> D"),
    "layers.{i}.self_attn.q_proj.weight": ("blocks/attn/w_q", "(N H) D -> D N H"),
    "layers.{i}.self_attn.q_proj.bias": ("blocks/attn/b_q", "(N H) -> N H"),
    "layers.{i}.self_attn.k_proj.weight": ("blocks/attn/w_k", "(N H) D -> D N H"),
    "layers.{i}.self_attn.v_proj.weight": ("blocks/attn/w_v", "(N H) D -> D N H"),
    "layers.{i}.self_attn.v_proj.bias": ("blocks/attn/b_v", "(N H) -> N H"),
    "layers.{i}.self_attn.out_proj.weight": ("blocks/attn/w_o", "D (N H) -> N H D"),
    "layers.{i}.self_attn.out_proj.bias": ("blocks/attn/b_o", "D -> D"),
    "layers.{i}.final_layer_norm.weight": ("blocks/mlp_norm/scale", "D -> D"),
    "layers.{i}.final_layer_norm.bias": ("blocks/mlp_norm/bias", "D -> D"),
    "layers.{i}.fc1.weight": ("blocks/w_up", "F D -> D F"),
    "layers.{i}.fc1.bias": ("blocks/b_up", "F -> F"),
    "layers.{i}.fc2.weight": ("blocks/w_down", "D F -> F D"),
    "layers.{i}.fc2.bias": ("blocks/b_down", "D -> D"),
    "ln_post.weight": ("norm/scale", "D -> D"),
    "ln_post.bias": ("norm/bias", "D -> D"),
    "proj.weight": ("w_out", "O D -> D O"),
    "proj.bias": ("b_out", "O -> O"),
    "audio_bos_eos_token.weight": ("bos_eos", "W O -> W O"),
}

TEXT = {
    "model.embed_tokens.weight": ("embed", "V D -> V D"),
    "model.layers.{i}.input_layernorm.weight": ("blocks/attn_norm", "D -> D"),
    "model.layers.{i}.self_attn.q_proj.weight": ("blocks/attn/w_q", "(N H) D -> D N H"),
    "model.layers.{i}.self_attn.q_proj.bias": ("blocks/attn/b_q", "(N H) -> N H"),
    "model.layers.{i}.self_attn.k_proj.weight": ("blocks/attn/w_k", "(K H) D -> D K H"),
    "model.layers.{i}.self_attn.k_proj.bias": ("blocks/attn/b_k", "(K H) -> K H"),
    "model.layers.{i}.self_attn.v_proj.weight": ("blocks/attn/w_v", "(K H) D -> D K H"),
    "model.layers.{i}.self_attn.v_proj.bias": ("blocks/attn/b_v", "(K H) -> K H"),
    "model.layers.{i}.self_attn.o_proj.weight": ("blocks/attn/w_o", "D (N H) -> N H D"),
    "model.layers.{i}.post_attention_layernorm.weight": ("blocks/mlp_norm", "D -> D"),
    "model.layers.{i}.mlp.gate_proj.weight": ("blocks/mlp/w_gate", "F D -> D F"),
    "model.layers.{i}.mlp.up_proj.weight": ("blocks/mlp/w_up", "F D -> D F"),
    "model.layers.{i}.mlp.down_proj.weight": ("blocks/mlp/w_down", "D F -> F D"),
    "model.norm.weight": ("norm", "D -> D"),
    "lm_head.weight": ("lm_head", "V D -> D V"),
}

TOWERS = {"vision": ("visual.", VISION), "audio": ("audio_tower.", AUDIO), "text": ("", TEXT)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor on disk: its name and shape there, and where it belongs in our tree."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None
    pattern: str
    sizes: Mapping[str, int]

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """From the layout on disk to ours."""
        disk = self.pattern.split(" -> ")[0]
        return rearrange(tensor, self.pattern, **_used(self.sizes, disk))

    def disk(self, array: np.ndarray) -> np.ndarray:
        """From our layout to the one on disk."""
        disk, ours = self.pattern.split(" -> ")
        return rearrange(array, f"{ours} -> {disk}", **_used(self.sizes, ours))


def entries(cfg: SaberConfig) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint, by its name without the prefix `thinker.`."""
    return {entry.name: entry for tower in TOWERS for entry in _tower_entries(cfg, tower)}


def on_disk(params: Mapping[str, Any], entry: TensorEntry) -> np.ndarray:
    """One tensor of a checkpoint in its layout there, a view where that is possible.

    `params` holds arrays, or objects that read when indexed (train/stream.py).
    """
    leaf = _leaf(params, entry.path)
    return entry.disk(np.asarray(leaf[... if entry.layer is None else entry.layer]))


def to_disk(
    params: Mapping[str, Any], cfg: SaberConfig
) -> Iterator[tuple[TensorEntry, np.ndarray]]:
    """Every tensor of a checkpoint in its layout there, one at a time."""
    for entry in entries(cfg).values():
        yield entry, on_disk(params, entry)


def from_disk(read: Callable[[TensorEntry], np.ndarray], cfg: SaberConfig) -> dict[str, Any]:
    """Our tree of float32 arrays, given a function that reads one tensor of a checkpoint."""
    tree = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), saber.abstract(cfg))
    for entry in entries(cfg).values():
        leaf = _leaf(tree, entry.path)
        leaf[... if entry.layer is None else entry.layer] = entry.ours(read(entry))
    return tree


def _tower_entries(cfg: SaberConfig, tower: str) -> Iterator[TensorEntry]:
    prefix, table = TOWERS[tower]
    sizes, shapes = _sizes(cfg, tower), saber.abstract(cfg)[tower]
    for name, (path, pattern) in table.items():
        keys = tuple(path.split("/"))
        shape = _leaf(shapes, keys).shape
        layers = range(shape[0]) if "{i}" in name else [None]
        one = shape[1:] if "{i}" in name else shape
        for layer in layers:
            entry = TensorEntry(
                name=prefix + name.replace("{i}", str(layer)),
                shape=(),
                path=(tower, *keys),
                layer=layer,
                pattern=pattern,
                sizes=sizes,
            )
            # A view without memory, because only its shape is needed.
            empty = np.broadcast_to(np.int8(0), one)
            yield dataclasses.replace(entry, shape=entry.disk(empty).shape)


def _sizes(cfg: SaberConfig, tower: str) -> dict[str, int]:
    """Sizes that a layout needs to split a dimension."""
    if tower == "text":
        return {"N": cfg.text.heads, "K": cfg.text.kv_heads, "H": cfg.text.head_dim}
    if tower == "audio":
        return {"N": cfg.audio.heads, "H": cfg.audio.head_dim}
    vision = cfg.vision
    patch = {"C": 3, "T": vision.temporal_patch, "P": vision.patch, "Q": vision.patch}
    return {"N": vision.heads, "H": vision.head_dim, **patch}


def _used(sizes: Mapping[str, int], side: str) -> dict[str, int]:
    letters = side.replace("(", " ").replace(")", " ").split()
    return {letter: size for letter, size in sizes.items() if letter in letters}


def _leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
