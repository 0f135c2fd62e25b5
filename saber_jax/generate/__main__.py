"""Describes any clip on the terminal, streaming the six sections:

python -m saber_jax.generate --checkpoint runs/tiny/cadpo --video clip.mp4 --language en
"""

import sys
from collections.abc import Sequence

from saber_jax.data import sed
from saber_jax.data.records import LANGUAGES
from saber_jax.data.withhold import MODALITIES
from saber_jax.flags import Parser
from saber_jax.generate import decoding
from saber_jax.generate.generator import load_generator, record_of_clip
from saber_jax.train import checkpoint


class Printer:
    """Prints an answer while it grows."""

    def __init__(self) -> None:
        self._shown = 0

    def __call__(self, _: int, text: str, *, last: bool = False) -> None:
        # The last characters may be half of a multi-byte one until more tokens have come.
        settled = text if last else text.rstrip("\ufffd")
        print(settled[self._shown :], end="\n" if last else "", flush=True)
        self._shown = len(settled)


def main(argv: Sequence[str] | None = None) -> int:
    """Describes one clip on the terminal; returns the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="work directory of a training run")
    parser.add_argument(
        "--video", required=True, help="any video file with a sound track, or a picture"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the answer")
    parser.add_argument("--withhold", choices=MODALITIES, help="hide one modality")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    flags = parser.parse_args(argv)
    try:
        about = checkpoint.read_model_file(flags.checkpoint)
        sampling = decoding.Sampling(
            temperature=flags.temperature, top_p=flags.top_p, seed=flags.seed
        )
        settings = about.get("provenance", {}).get("sampling")
        record = record_of_clip(flags.video, flags.language, settings)
        generator = load_generator(
            flags.checkpoint, max_new_tokens=flags.max_new_tokens, batch_size=1
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = Printer()
    (answer,) = generator.respond(
        [record], withhold=flags.withhold, sampling=sampling, on_text=shown
    )
    shown(0, answer, last=True)
    emotion = sed.conclusion(answer) or "none named"
    print(f"conclusion: {emotion}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
