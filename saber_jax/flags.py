"""Argument parser of the commands: help with all defaults, and suggestions for mistyped flags."""

import argparse
import difflib
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows a command's docstring as it is written."""

    def __init__(self, description: str | None, **options: Any):
        style = argparse.RawDescriptionHelpFormatter
        options.setdefault("prog", _command())
        super().__init__(description=description, formatter_class=style, **options)
        self._typed: list[str] = []

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As ArgumentParser's; the help text also says the default, if there is one."""
        action = super().add_argument(*names, **options)
        said = action.help or ""
        has_default = action.default not in (None, False, argparse.SUPPRESS, [], ())
        if has_default and said != argparse.SUPPRESS and "default" not in said:
            action.help = f"{said} (default: %(default)s)".lstrip()
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ArgumentParser's; `error` has to know what was typed."""
        self._typed = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exits with 2 and one line. A flag that does not exist comes first, with the nearest one
        that does: argparse would rather name the required flag that was misspelt."""
        known = [name for action in self._actions for name in action.option_strings]
        names = [argument.partition("=")[0] for argument in self._typed]
        for name in names:
            if name.startswith("--") and not any(flag.startswith(name) for flag in known):
                near = difflib.get_close_matches(name, known, n=1)
                message = f"there is no {name}" + (f"; did you mean {near[0]}?" if near else "")
                break
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def _command() -> str | None:
    """What was typed to run this module; None outside of `python -m`."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
