"""A local web page: drop a clip, watch the six sections stream, remove the sound or the picture.

    python -m saber_jax.demo --checkpoint runs/tiny/cadpo

The page is only served on this machine (127.0.0.1), and only for requests with that host name,
which prevents DNS rebinding. The size and length of clips and the time for an answer are limited.
Only the dropped clips and a few examples (--examples, or the corpus next to the checkpoint) can be
accessed. It needs Gradio: launch/setup.sh --demo, or pip install -r requirements-demo.txt.
"""

import dataclasses
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saber_jax.data import decode, sed
from saber_jax.data.records import FIELDS, LANGUAGES, Record
from saber_jax.data.withhold import withhold
from saber_jax.flags import Parser
from saber_jax.generate.generator import Generator, load_generator, record_of_clip
from saber_jax.train import checkpoint

# Before gradio is imported: it would report every start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

LOOPBACK = "127.0.0.1"
NAMES = [LOOPBACK, "localhost"]
"""The host names that a browser may send in its Host header."""
MOST_EXAMPLES = 6
UPLOAD_SECONDS = 3600
"""Uploaded clips older than this are deleted, once in as long."""
SENSES = {
    (True, True): "sound and picture",
    (True, False): "sound alone",
    (False, True): "picture alone",
    (False, False): "neither",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request."""

    megabytes: int = 64
    clip_seconds: float = 60.0
    answer_seconds: float = 300.0


class Stopped(Exception):
    """Raised in a request whose answer is no longer needed."""


class Describer:
    """Answers a dropped file, yielding the text as it grows."""

    def __init__(self, generator: Generator, settings: dict[str, Any] | None, limits: Limits):
        """`settings` are the checkpoint's own fields of decode.FrameSampling."""
        self._generator, self._limits = generator, limits
        settings = dict(settings or {})
        most = min(settings.get("max_seconds", limits.clip_seconds), limits.clip_seconds)
        self._settings = settings | {"max_seconds": most}
        self._stops: dict[str, threading.Event] = {}
        # One thread for all: an answer that was given up goes on until its next text, and another
        # one beside it would need as much memory again. The thread keeps its decoding process.
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def describe(
        self, path: str, language: str, *, sound: bool, picture: bool, visitor: str = ""
    ) -> Iterator[str]:
        """The answer so far, again and again. Raises MediaError, TimeoutError with a time limit
        that ran out, or Stopped."""
        size = Path(path).stat().st_size
        if size > self._limits.megabytes << 20:
            detail = f"{size / 2**20:.0f} MB, allowed are {self._limits.megabytes} MB"
            raise decode.MediaError("too_long", detail)

        def record() -> Record:
            found = record_of_clip(path, language, self._settings)
            if not sound:
                found = withhold(found, "audio")
            return found if picture else withhold(found, "video")

        yield from self._stream(record, visitor)

    def stop(self, visitor: str = "") -> None:
        """Ends the running answer of this visitor; no further token is generated."""
        if stopped := self._stops.get(visitor):
            stopped.set()

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def _stream(self, decoded: Callable[[], Record], visitor: str) -> Iterator[str]:
        texts: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        stopped = self._stops[visitor] = threading.Event()

        def check() -> None:
            if stopped.is_set():
                raise Stopped

        def hear(_: int, text: str) -> None:
            check()
            texts.put(text)

        def answer() -> None:
            try:
                check()
                record = decoded()
                check()
                texts.put(self._generator.respond([record], on_text=hear)[0])
                texts.put(None)
            except Exception as error:  # Whatever it is, it belongs to whoever waits.
                texts.put(error)

        end = time.monotonic() + self._limits.answer_seconds
        self._jobs.put(answer)
        try:
            while (text := texts.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                if isinstance(text, BaseException):
                    raise text
                # The last characters may be half of a multi-byte one until more tokens have come.
                yield text.rstrip("\ufffd")
        except queue.Empty:
            raise TimeoutError(
                f"No complete answer in {self._limits.answer_seconds:g} s; take a shorter clip, or "
                "start the demo with a larger --answer_seconds."
            ) from None
        finally:
            stopped.set()
            if self._stops.get(visitor) is stopped:
                del self._stops[visitor]


def _handlers(describer: Describer) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The handlers of the page's buttons: (ask, stop)."""
    import gradio as gr

    def ask(
        path: str | None,
        language: str,
        sound: bool,
        picture: bool,
        history: list[list[str]],
        request: gr.Request,
    ):
        if not path:
            gr.Info("Drop a clip first.")
            yield [gr.skip()] * (len(FIELDS) + 3)
            return
        text, visitor = "", request.session_hash or ""
        senses = {"sound": sound, "picture": picture}
        try:
            for text in describer.describe(path, language, visitor=visitor, **senses):
                sections = sed.parse_response(text)
                yield ["…", *(sections[field] for field in FIELDS), gr.skip(), gr.skip()]
        except Stopped:
            return
        except (decode.MediaError, TimeoutError) as error:
            raise gr.Error(str(error)) from None
        concluded = sed.conclusion(text) or "no emotion named"
        history = [*history, [SENSES[sound, picture], concluded]]
        sections = sed.parse_response(text)
        yield [concluded, *(sections[field] for field in FIELDS), history, history]

    def stop(request: gr.Request) -> str:
        # Gradio only stops listening to `ask`; the model must be told.
        describer.stop(request.session_hash or "")
        return "stopped"

    return ask, stop


def example_clips(folder: Path) -> list[Path]:
    """A few clips of `folder`, evenly chosen; none if there is no such folder."""
    found = sorted(path for path in folder.glob("*") if path.suffix in (".mp4", ".webm"))
    # The embedded corpus names its clips by split; held-out ones show more.
    found = [path for path in found if path.name.startswith("test")] or found
    return found[:: -(-len(found) // MOST_EXAMPLES) or 1]


def build(describer: Describer, *, name: str = "", examples: Sequence[Path] = ()) -> Any:
    """The page, as gradio.Blocks. `name` says which checkpoint answers."""
    import gradio as gr

    run, halt = _handlers(describer)
    # Without `delete_cache`, every clip that was uploaded would be kept.
    with gr.Blocks(
        title="SABER-LLM", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)
    ) as page:
        gr.Markdown(
            "# SABER-LLM\nDrop a clip. The model states what it sees, what it hears, and only then "
            "concludes. Take away the sound or the picture: does it still conclude the same?"
        )
        if name:
            gr.Markdown(f"Checkpoint `{name}`", elem_id="checkpoint")
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                clip = gr.Video(label="Clip", sources=["upload"], elem_id="clip")
                sound = gr.Checkbox(value=True, label="sound", elem_id="sound")
                picture = gr.Checkbox(value=True, label="picture", elem_id="picture")
                language = gr.Radio(list(LANGUAGES), value="en", label="language of the answer")
                if examples:
                    clips = [[str(path)] for path in examples]
                    gr.Examples(clips, [clip], label="Or take one of these", cache_examples=False)
                with gr.Row():
                    ask = gr.Button("Describe", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=2, min_width=280):
                conclusion = gr.Textbox(label="Conclusion", elem_id="conclusion", lines=1)
                sections = [
                    gr.Textbox(label=sed.TITLES[field], elem_id=field, lines=1, max_lines=12)
                    for field in FIELDS
                ]
                table = gr.Dataframe(
                    headers=["from", "conclusion"],
                    label="Conclusions about this clip",
                    interactive=False,
                    elem_id="history",
                )
        outputs = [conclusion, *sections, history, table]
        started = gr.on(
            # Taking something away asks again at once.
            [ask.click, sound.input, picture.input],
            run,
            [clip, language, sound, picture, history],
            outputs,
            trigger_mode="always_last",
            show_progress_on=[conclusion],  # One spinner, not one in every box.
            api_visibility="private",
        )
        stop.click(halt, None, conclusion, queue=False, api_visibility="private")
        stop.click(None, cancels=[started], api_visibility="private")
        clip.change(lambda: ([], []), None, [history, table], api_visibility="private")
    # One answer at a time; those who wait beyond eight are told so.
    return page.queue(default_concurrency_limit=1, max_size=8)


def serve(page: Any, *, port: int, limits: Limits, block: bool = True) -> str:
    """Serves until interrupted; with block=False returns the address at once."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Against DNS rebinding: a page of another origin whose name comes to mean 127.0.0.1.
    only_us = Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False)
    _, address, _ = page.launch(
        app_kwargs={"middleware": [only_us]},
        # Gradio asks its own page for an answer within 3 s, and gives up on a busy machine.
        _frontend=False,
        server_name=LOOPBACK,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        show_error=False,
        ssr_mode=False,
        strict_cors=True,
        max_file_size=f"{limits.megabytes}mb",
        footer_links=[],
        prevent_thread_lock=True,
        # Gradio's own themes fetch their fonts from a server.
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    print(f"SABER-LLM listens on {address} (this machine only). Stop it with Ctrl-C.", flush=True)
    if block:
        page.block_thread()
    return address


def main(argv: Sequence[str] | None = None) -> int:
    """Loads the model and serves the page; returns the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="work directory of a training run")
    parser.add_argument("--examples", type=Path, help="a folder of clips to offer")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    for field in dataclasses.fields(Limits):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    flags = parser.parse_args(argv)
    limits = Limits(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Limits)})
    try:
        import gradio  # noqa: F401
    except ImportError:
        print("error: the demo needs Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
        return 1
    try:
        about = checkpoint.read_model_file(flags.checkpoint)
        generator = load_generator(
            flags.checkpoint, max_new_tokens=flags.max_new_tokens, batch_size=1
        )
        describer = Describer(generator, about.get("provenance", {}).get("sampling"), limits)
        beside = Path(flags.checkpoint).resolve().parent / "corpus/clips"
        page = build(
            describer, name=flags.checkpoint, examples=example_clips(flags.examples or beside)
        )
        serve(page, port=flags.port, limits=limits)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
