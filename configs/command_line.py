"""Parsing of `--config=configs/NAME.py:VARIANT --config.key=value`, with helpful errors.

A command that takes a config calls `answer_early` before it imports jax, which takes seconds, so
that --help and errors in flags are printed at once. It passes `parse_flags` to absl.app.run.
"""

import ast
import difflib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging  # noqa: F401  logging defines flags of its own.
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py:VARIANT")
flags.mark_flag_as_required("config")

HELP = ("-h", "--help", "-help", "--helpfull", "--helpshort")
SHOWN_WITHOUT_CONFIG = "configs/sft.py:tiny"

_positional: list[str] | None = None
"""The positional arguments, once `answer_early` has parsed the flags. Flags that override a setting
are defined while they are parsed, so they cannot be parsed twice."""


def answer_early() -> None:
    """Exits with the help text for --help, and with one line if the arguments are wrong.

    From then on SIGTERM ends the process with status 75 (try again): nothing is begun yet. A run
    has handlers of its own later (runs/distributed.py).
    """
    global _positional
    signal.signal(signal.SIGTERM, lambda *_: os._exit(os.EX_TEMPFAIL))
    _positional = parse_flags(sys.argv)


def parse_flags(argv: list[str]) -> list[str]:
    """For absl.app.run(flags_parser=...): exits with one line instead of a traceback for errors,
    and with status 0 after printing help. After `answer_early` it returns what that parsed."""
    if _positional is not None:
        return _positional
    if any(argument in HELP for argument in argv[1:]):
        print(help_text(sys.modules["__main__"].__doc__ or "", argv[1:]))
        sys.exit(0)
    try:
        _check_file(argv)
        _check_buckets(argv)
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # Of a setting, and of a group of settings.
        got = re.findall(r"\w+", str(error))[0]
        near = re.findall(r'Did you mean "(\w+)"', str(error))
        hint = f"; did you mean {near[0]!r}?" if near else "."
        sys.exit(f"There is no setting {got!r}{hint} Settings and what they do: configs/*.py")
    except (flags.Error, OSError, ValueError, TypeError) as error:
        if "--config must have a value" in str(error):
            sys.exit(f"Give a config: --config=configs/NAME.py:VARIANT, as {SHOWN_WITHOUT_CONFIG}.")
        # ml_collections wraps the config's own error into its traceback.
        sys.exit(re.split(r"\b[A-Z]\w*Error: ", str(error).strip())[-1])


def help_text(doc: str, arguments: list[str]) -> str:
    """The command's docstring, its own flags, and every setting with its value and meaning.

    The values are those of the config that `arguments` name, or of SHOWN_WITHOUT_CONFIG.
    """
    named = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    name = named[0] if named else SHOWN_WITHOUT_CONFIG
    parse_flags([sys.argv[0], f"--config={name}"])
    comments = setting_comments(Path("configs/sft.py")) | setting_comments(
        Path(name.partition(":")[0])
    )
    own = [
        f"  --{flag.name}={flag.default if flag.default is not None else ''}  {flag.help}"
        for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        if flag.name != "config"
    ]
    lines = [doc.strip(), "", "flags:", "  --config=configs/NAME.py:VARIANT, required", *own, ""]
    lines.append(f"settings, as they are in {name}:")
    for key, value in _flat(CONFIG.value).items():
        group = key.rpartition(".")[0]
        said = [*comments.pop(group, ()), *comments.get(key, ())]  # Of a group only once.
        lines += [f"  # {comment}" for comment in said]
        lines.append(f"  --config.{key}={value}")
    return "\n".join(lines)


def setting_comments(file: Path) -> dict[str, list[str]]:
    """{"data.length": lines}: the comments above and next to `c.data.length = ...` in a config.

    A function other than get_config defines the group of the same name.
    """
    source = file.read_text("utf-8")
    lines, found = source.splitlines(), {}
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    for function, node in ((f, node) for f in functions for node in ast.walk(f)):
        if not isinstance(node, ast.Assign):
            continue
        above = node.lineno - 2  # Line numbers begin at 1.
        comments: list[str] = []
        while lines[above].strip().startswith("#"):
            comments.insert(0, lines[above].strip().lstrip("# "))
            above -= 1
        _, _, beside = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
        comments += [beside] if beside else []
        for target in node.targets:
            name = ast.unparse(target)
            if comments and name.startswith("c."):
                group = "" if function.name == "get_config" else f"{function.name}."
                found[group + name.removeprefix("c.")] = comments
    return found


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"data": {"length": 352}} -> {"data.length": 352}, in the order of the config file."""
    flat: dict[str, Any] = {}
    for key in json.loads(config.to_json()):  # Iterating a ConfigDict sorts it.
        value = config[key]
        nested = isinstance(value, ConfigDict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _check_file(argv: list[str]) -> None:
    for argument in argv:
        if not argument.startswith("--config="):
            continue
        file = argument.removeprefix("--config=").split(":")[0]
        if not Path(file).exists():
            files = sorted(Path("configs").glob("*.py"))
            known = [str(path) for path in files if "def get_config" in path.read_text("utf-8")]
            near = difflib.get_close_matches(file, known, n=1, cutoff=0.0)
            raise ValueError(
                f"There is no config {file!r}; did you mean {near[0]!r}? There are {known}."
            )


def _check_buckets(argv: list[str]) -> None:
    # It would be used as a local path: a folder called "gs:".
    settings = [argument for argument in argv if argument.startswith("--config")]
    if found := [setting for setting in settings if "gs://" in setting]:
        raise ValueError(
            f"{found[0]}: settings name a bucket by its folder. launch/tpu_run.sh gives it one. "
            "For other commands set SABER_MOUNTS=FOLDER=gs://BUCKET and give a path below FOLDER "
            "(docs/performance.md, `Buckets`)."
        )
