"""How transformers writes a conversation: the template of an export, and that of a checkpoint."""

from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from saber_jax.data import chat
from saber_jax.data.chat import DEFAULT_SYSTEM
from saber_jax.runs.files import read_json, read_text

TEMPLATE = "chat_template.jinja"
PLACES = (TEMPLATE, "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Where a checkpoint may have one. transformers takes the first that has."""

# saber_jax.data.chat.render in the language of transformers' templates. A part of a message is
# known by its type or by the key that holds it, because servers pass on both kinds.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'image_url') or 'image' in content %}"
    "{{ '<|vision_bos|><|IMAGE|><|vision_eos|>' }}"
    "{% elif content['type'] in ('audio', 'audio_url', 'input_audio') or 'audio' in content %}"
    "{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{% elif content['type'] in ('video', 'video_url') or 'video' in content %}"
    "{{ '<|vision_bos|><|VIDEO|><|vision_eos|>' }}"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def difference(directory: Path) -> str | None:
    """How a checkpoint's own template writes conversations otherwise than `chat.render`.

    None if it does not, or if there is none. Training, mining and evaluation never read it, so a
    model that was trained with another one gets prompts in a form that is new to it.
    """
    try:
        name, template = _find(directory)
    except ValueError as error:
        return str(error)
    for messages, parts in _CONVERSATIONS if template else ():
        want = chat.render(messages)
        try:
            got = _ENVIRONMENT.from_string(template).render(
                messages=parts, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError) as error:
            return f"{name} cannot write a conversation with a clip: {error}"
        if got != want:
            return f"{name} writes {got!r} where training writes {want!r}"
    return None


def _find(directory: Path) -> tuple[str, str]:
    """The file and the template in it, or "" twice. Raises ValueError for a damaged file."""
    for name in PLACES:
        if not (directory / name).is_file():
            continue
        if name == TEMPLATE:
            return name, read_text(directory / name)
        content = read_json(directory / name)
        found = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(found, list):  # Several by name.
            named = [entry for entry in found if isinstance(entry, dict)]
            found = {entry.get("name"): entry.get("template") for entry in named}.get("default")
        if isinstance(found, str):
            return name, found
    return "", ""


_VIDEO = chat.Video(grid=(1, 4, 4), seconds_per_grid=1.0)
_SOUND = chat.Audio(frames=100)
_QUESTION = [
    {"type": "video", "video": "clip.mp4"},
    {"type": "audio", "audio": "clip.wav"},
    {"type": "text", "text": "What does she feel?"},
]
_ASKED = chat.Message(role="user", content=(_VIDEO, _SOUND, "What does she feel?"))
_CONVERSATIONS = [
    ([_ASKED], [{"role": "user", "content": _QUESTION}]),
    (
        [
            chat.Message(role="system", content=("Be brief.",)),
            _ASKED,
            chat.Message(role="assistant", content=("Joy.",)),
            chat.Message(role="user", content=("Why?",)),
        ],
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": [{"type": "text", "text": "Joy."}]},
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        ],
    ),
]
"""Each as `chat.render` takes it, and as templates take it."""


def _refuse(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


# As transformers has it.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
_ENVIRONMENT.globals["raise_exception"] = _refuse
