"""A checkpoint with another chat template than training is loaded, with a note that says so."""

import json

import pytest

from saber_jax.hf import export, load
from saber_jax.hf.chat_template import CHAT_TEMPLATE, TEMPLATE, difference

OTHER = CHAT_TEMPLATE.replace("a helpful assistant", "an actor")
SAME = """{% for m in messages -%}
{% if loop.first and m.role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
<|im_start|>{{ m.role }}
{% for part in m.content -%}
{%- if part.type == 'text' %}{{ part.text }}
{%- else %}{{ {'video': '<|vision_bos|><|VIDEO|><|vision_eos|>',
               'audio': '<|audio_bos|><|AUDIO|><|audio_eos|>'}[part.type] }}
{%- endif %}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _in_json(template):
    return json.dumps({"chat_template": template})


def _in_list(template):
    other = {"name": "tool_use", "template": "tools"}
    return json.dumps({"chat_template": [other, {"name": "default", "template": template}]})


PLACES = {
    TEMPLATE: str,
    "chat_template.json": _in_json,
    "processor_config.json": _in_json,
    "tokenizer_config.json": _in_list,
}


def test_an_export_has_the_template_of_training(exported):
    assert difference(exported) is None


@pytest.mark.parametrize("place", PLACES)
def test_only_what_a_template_writes_counts(tmp_path, place):
    (tmp_path / place).write_text(PLACES[place](SAME))
    assert difference(tmp_path) is None
    (tmp_path / place).write_text(PLACES[place](OTHER))
    found = difference(tmp_path) or ""
    assert "You are an actor." in found
    assert "training writes '<|im_start|>system\\nYou are a helpful" in found


def test_a_checkpoint_may_have_no_template(tmp_path):
    assert difference(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    assert difference(tmp_path) is None


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('No clips.') }}", "No clips."),
        ("{{ messages[0].content + 'x' }}", "can only concatenate list"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.pop() }}", "unsafe"),
    ],
)
def test_a_template_that_cannot_write_a_clip_is_named(tmp_path, template, says):
    (tmp_path / TEMPLATE).write_text(template)
    found = difference(tmp_path) or ""
    assert found.startswith(f"{TEMPLATE} cannot write a conversation with a clip: ")
    assert says in found


def test_load_and_export_say_so(copy, tmp_path, capsys):
    (copy / TEMPLATE).write_text(OTHER)
    work = tmp_path / "work"
    assert load.main(["--hf_dir", str(copy), "--out", str(work)]) == 0
    assert f"note: the chat template of {copy} is not used" in capsys.readouterr().out
    command = ["--checkpoint", str(work), "--out", str(tmp_path / "again"), "--source", str(copy)]
    assert export.main(command) == 0
    assert "note: the copied chat template is not that of training" in capsys.readouterr().out
