"""The files beside the weights of an export: tokenizer, processor, chat template, defaults.

`AutoProcessor` of transformers opens them; its image and video processors need torchvision.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saber_jax.data import media
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.hf.chat_template import CHAT_TEMPLATE, TEMPLATE
from saber_jax.hf.tensors import POINTER, is_pointer
from saber_jax.hf.tokenizer import FILES as TOKENIZER_FILES
from saber_jax.hf.tokenizer import write_tokenizer
from saber_jax.models.config import SaberConfig
from saber_jax.models.vision import PIXEL_MEAN, PIXEL_STD
from saber_jax.runs.files import read_json, write_json, write_text

GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
VOICES = "spk_dict.pt"
SETTINGS = (PREPROCESSOR, "video_preprocessor_config.json", "processor_config.json")
"""Files in which versions of transformers keep the settings of their processors."""
PARTS = ("feature_extractor", "image_processor", "video_processor")
"""Objects in processor_config.json."""
FILES = (*TOKENIZER_FILES, GENERATION, PREPROCESSOR, TEMPLATE, VOICES)

# Settings that data/media.py and the towers fix. The mean and standard deviation are of pixels.
_FIXED = (
    *("feature_size", "sampling_rate", "hop_length", "n_fft", "dither", "chunk_length"),
    *("padding_value", "padding_side"),
    *("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size"),
)


def write_processor(out: Path, cfg: SaberConfig, tokenizer: Tokenizer | None) -> None:
    """Writes FILES except VOICES; those of the tokenizer only if there is one."""
    write_json(out / GENERATION, _generation(cfg))
    write_json(out / PREPROCESSOR, _preprocessor(cfg))
    write_text(out / TEMPLATE, CHAT_TEMPLATE)
    if tokenizer is not None:
        write_tokenizer(tokenizer, out)


def differences(directory: Path, cfg: SaberConfig) -> list[str]:
    """Settings of a checkpoint's processors by which it sees or hears otherwise than we do.

    Sizes to which pictures are resized are left out: they are settings of our records.
    """
    fixed = {key: _preprocessor(cfg)[key] for key in _FIXED}
    fixed |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    fixed |= {"rescale_factor": 1 / 255, "resample": Image.Resampling.BICUBIC}
    wrong = []
    for name in SETTINGS:
        if not (directory / name).is_file():
            continue
        if is_pointer(directory / name):
            wrong.append(f"{name} {POINTER}")
            continue
        try:
            content = read_json(directory / name)
        except ValueError as error:
            wrong.append(str(error))
            continue
        content = content if isinstance(content, dict) else {}
        parts = {f"{part}.": content.get(part) for part in PARTS}
        for where, section in {"": content, **parts}.items():
            for key, want in fixed.items() if isinstance(section, dict) else ():
                got = section.get(key)
                if got is not None and not _equal(got, want):
                    wrong.append(f"{name}: {where}{key} must be {want}, got {got!r}")
    return wrong


def _equal(got: Any, want: Any) -> bool:
    if isinstance(want, str):
        return got == want
    try:
        return np.shape(got) == np.shape(want) and np.allclose(got, want, atol=1e-6)
    except (TypeError, ValueError):
        return False


def write_no_voices(out: Path) -> None:
    """An empty spk_dict.pt, in the older of torch's two formats, which pickle alone can write.

    transformers opens this file of the whole omni model even where speech is switched off.
    """
    magic, version = 0x1950A86A20F9469CFC6C, 1001
    system = {"protocol_version": version, "little_endian": True, "type_sizes": {}}
    voices: dict[str, Any] = {}
    storages: list[str] = []
    with (out / VOICES).open("wb") as file:
        for part in (magic, version, system, voices, storages):
            pickle.dump(part, file, protocol=2)


def _generation(cfg: SaberConfig) -> dict[str, Any]:
    ids = cfg.tokens
    return {
        "bos_token_id": ids.im_start,
        "eos_token_id": [ids.eos, ids.pad],
        "pad_token_id": ids.pad,
        "do_sample": False,
    }


def _preprocessor(cfg: SaberConfig) -> dict[str, Any]:
    """The settings of transformers' processors that do what saber_jax.data.media does."""
    samples = media.MAX_AUDIO_SECONDS * media.SAMPLE_RATE
    return {
        "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": cfg.audio.mel_bins,
        "sampling_rate": media.SAMPLE_RATE,
        "hop_length": media.HOP,
        "n_fft": media.FFT,
        "chunk_length": media.MAX_AUDIO_SECONDS,
        "n_samples": samples,
        "nb_max_frames": samples // media.HOP,
        "dither": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "min_pixels": 3136,
        "max_pixels": 12_845_056,
        "patch_size": cfg.vision.patch,
        "temporal_patch_size": cfg.vision.temporal_patch,
        "merge_size": cfg.vision.merge,
    }
