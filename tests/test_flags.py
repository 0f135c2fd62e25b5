"""The command lines of `python -m ...`."""

import argparse

import pytest

from saber_jax.flags import Parser


@pytest.fixture
def parser():
    made = Parser("Does it.\n\n    python -m it --file F\n", prog="it")
    made.add_argument("--file", required=True)
    made.add_argument("--size", type=int, default=64, help="of a batch")
    made.add_argument("--rate", type=float, default=0.5)
    made.add_argument("--out", help="default: FILE.out")
    made.add_argument("--hidden", default=3, help=argparse.SUPPRESS)
    return made


def test_help_shows_the_docstring_as_it_is_and_every_default(parser):
    text = parser.format_help()
    assert "\n    python -m it --file F\n" in text
    assert "of a batch (default: 64)" in text and "(default: 0.5)" in text
    assert text.count("FILE.out") == 1 and "hidden" not in text


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--fiel", "x"], "there is no --fiel; did you mean --file?"),
        (["--file", "x", "--sise=3"], "there is no --sise; did you mean --size?"),
        (["--file", "x", "--size", "many"], "argument --size: invalid int value: 'many'"),
        (["--size", "3"], "the following arguments are required: --file"),
    ],
)
def test_a_typing_error_gets_one_line_with_the_nearest_flag(parser, capsys, typed, said):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(typed)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"it: error: {said} (--help lists all flags)\n"
