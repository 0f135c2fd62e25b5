"""Sizes of the network. The named sizes are `tiny`, `3b` and `7b`, and there are no other presets.

The released checkpoints: https://huggingface.co/Qwen/Qwen2.5-Omni-3B and .../Qwen2.5-Omni-7B.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision tower; lengths in pixels, `out_width` is the width of the text tower."""

    depth: int
    width: int
    heads: int
    mlp_dim: int
    out_width: int
    full_attention_layers: tuple[int, ...]
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    norm_eps: float = 1e-6

    def __post_init__(self):
        _divisible("vision", self.width, self.heads, multiple_of=4)
        _one_value("vision", self, "patch", "temporal_patch", "merge", "window")
        outside = [i for i in self.full_attention_layers if not 0 <= i < self.depth]
        if outside:
            raise ValueError(
                f"vision.full_attention_layers names layers {outside}, but the tower has "
                f"{self.depth}. Use numbers from 0 to {self.depth - 1}."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def window_patches(self) -> int:
        """Maximum number of patches in a window."""
        return (self.window // self.patch) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: RGB x frames x rows x columns."""
        return 3 * self.temporal_patch * self.patch**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Audio tower; a chunk is 2 * n_window mel frames of 10 ms."""

    layers: int
    width: int
    heads: int
    mlp_dim: int
    out_width: int
    mel_bins: int = 128
    n_window: int = 100
    max_source_positions: int = 1500
    norm_eps: float = 1e-5

    def __post_init__(self):
        _divisible("audio", self.width, self.heads, multiple_of=1)
        if self.n_window % 2:
            raise ValueError(
                "audio.n_window must be even, or pooled pairs straddle chunks, got "
                f"{self.n_window}."
            )
        _one_value("audio", self, "mel_bins", "n_window")
        if self.max_source_positions < self.n_window:
            raise ValueError(
                f"audio.max_source_positions must be at least {self.n_window}, as one chunk of "
                f"sound has that many positions; got {self.max_source_positions}."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def chunk_tokens(self) -> int:
        """Rows of output per chunk."""
        return self.n_window // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text tower: a grouped-query decoder with three-axis rotary positions."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    norm_eps: float
    max_positions: int

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"text.heads must be a multiple of text.kv_heads, got {self.heads} and "
                f"{self.kv_heads}."
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                "text.mrope_section must sum to half of text.head_dim, because every frequency "
                f"belongs to one axis; got {self.mrope_section} and head_dim {self.head_dim}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Ids of the tokens that structure a conversation."""

    pad: int
    im_start: int
    eos: int
    audio: int
    audio_bos: int
    audio_eos: int
    vision_bos: int
    vision_eos: int
    image: int
    video: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, models/lora.py: `targets` are shell patterns over parameter names.

    Their output is scaled by alpha / rank. `dropout` is applied to their input in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1 or not self.targets:
            raise ValueError(
                f"lora needs a rank of at least 1 and at least one target, got rank {self.rank} "
                f"and targets {self.targets}. Without LoRA there is no LoraConfig."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.dropout is the share of their inputs that adapters lose in training, from 0 "
                f"to below 1; got {self.dropout}."
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaberConfig:
    """The whole network, including the settings of TMRoPE that map seconds to positions."""

    text: TextConfig
    vision: VisionConfig
    audio: AudioConfig
    tokens: TokenIds
    positions_per_second: int = 25
    seconds_per_chunk: int = 2
    lora: LoraConfig | None = None

    def __post_init__(self):
        _one_value("model", self, "positions_per_second", "seconds_per_chunk")
        for tower in (self.vision, self.audio):
            if tower.out_width != self.text.width:
                raise ValueError(
                    f"{type(tower).__name__}.out_width must equal text.width, because media and "
                    f"words share one sequence; got {tower.out_width} and {self.text.width}."
                )

    @property
    def widths(self) -> dict[str, int]:
        """The width of each tower, which FSDP cuts."""
        return {name: getattr(self, name).width for name in ("text", "vision", "audio")}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SaberConfig":
        """Inverse of `to_dict`, also after JSON. Raises ValueError for missing or unknown names."""
        values = dict(values)
        for name, section in _SECTIONS.items():
            if isinstance(values.get(name), Mapping):
                values[name] = _build(section, values[name], name + ".")
        return _build(cls, values, "")


_SECTIONS = {
    "text": TextConfig,
    "vision": VisionConfig,
    "audio": AudioConfig,
    "tokens": TokenIds,
    "lora": LoraConfig,
}


def _build(cls, values: Mapping[str, Any], where: str):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = {n for n, field in fields.items() if field.default is dataclasses.MISSING}
    missing, unknown = sorted(required - set(values)), sorted(set(values) - set(fields))
    if missing or unknown:
        raise ValueError(
            f"Not a model config: missing {[where + n for n in missing]}, unknown "
            f"{[where + n for n in unknown]}. Was it written by another version?"
        )
    return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def _one_value(where: str, config, *names: str) -> None:
    """Checks settings for which data/media.py and data/tmrope.py only support the default."""
    for field in dataclasses.fields(config):
        got = getattr(config, field.name)
        if field.name in names and got != field.default:
            raise ValueError(
                f"{where}.{field.name} must be {field.default}, as in every released model: "
                f"clips are prepared for nothing else. Got {got}."
            )


def _divisible(tower: str, width: int, heads: int, *, multiple_of: int) -> None:
    if width % heads or (width // heads) % multiple_of:
        raise ValueError(
            f"{tower}.width must be a multiple of {tower}.heads times {multiple_of}, got {width} "
            f"and {heads} heads."
        )


_QWEN_TOKENS = TokenIds(
    pad=151643,
    im_start=151644,
    eos=151645,
    audio=151646,
    audio_bos=151647,
    audio_eos=151648,
    vision_bos=151652,
    vision_eos=151653,
    image=151655,
    video=151656,
)

# The ids that the embedded vocabulary gives to its special tokens.
_TINY_TOKENS = TokenIds(
    pad=1,
    im_start=2,
    eos=3,
    audio=4,
    audio_bos=5,
    audio_eos=6,
    vision_bos=7,
    vision_eos=8,
    image=10,
    video=11,
)


def saber_config(name: str) -> SaberConfig:
    """One of the named sizes. Raises ValueError for any other name."""
    sizes = {"tiny": _tiny, "3b": _3b, "7b": _7b}
    if name not in sizes:
        raise ValueError(f"No model size {name!r}; the sizes are {', '.join(sizes)}.")
    return sizes[name]()


def _tiny() -> SaberConfig:
    text = TextConfig(
        layers=2,
        width=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        mlp_dim=384,
        vocab=1064,
        rope_theta=1e6,
        mrope_section=(4, 6, 6),
        norm_eps=1e-6,
        max_positions=4096,
    )
    vision = VisionConfig(
        depth=4, width=64, heads=4, mlp_dim=176, out_width=128, full_attention_layers=(1, 3)
    )
    audio = AudioConfig(layers=2, width=64, heads=4, mlp_dim=256, out_width=128)
    return SaberConfig(text=text, vision=vision, audio=audio, tokens=_TINY_TOKENS)


def _3b() -> SaberConfig:
    return _released(layers=36, width=2048, heads=16, kv_heads=2, mlp_dim=11008, vocab=151936)


def _7b() -> SaberConfig:
    return _released(layers=28, width=3584, heads=28, kv_heads=4, mlp_dim=18944, vocab=152064)


def _released(*, width: int, **text) -> SaberConfig:
    """The two released sizes differ in the text tower only."""
    return SaberConfig(
        text=TextConfig(
            width=width,
            head_dim=128,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
            norm_eps=1e-6,
            max_positions=32768,
            **text,
        ),
        vision=VisionConfig(
            depth=32,
            width=1280,
            heads=16,
            mlp_dim=3420,
            out_width=width,
            full_attention_layers=(7, 15, 23, 31),
        ),
        audio=AudioConfig(layers=32, width=1280, heads=20, mlp_dim=5120, out_width=width),
        tokens=_QWEN_TOKENS,
    )
