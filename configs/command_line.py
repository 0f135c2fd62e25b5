"""`--config=configs/NAME.py:VARIANT --config.key=value`, with errors a person can act on."""

import difflib
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py:VARIANT")
flags.mark_flag_as_required("config")


def parse_flags(argv: list[str]) -> list[str]:
    """For absl.app.run(flags_parser=...): exits with one line instead of a traceback."""
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
        # ml_collections wraps the config's own error into its traceback.
        sys.exit(re.split(r"\b[A-Z]\w*Error: ", str(error).strip())[-1])


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
    # A path would be made of it: a folder called "gs:" here.
    if found := [argument for argument in argv if "gs://" in argument]:
        raise ValueError(
            f"{found[0]}: a bucket is read and written as a folder. launch/tpu_run.sh mounts it; "
            "for other commands mount it with gcsfuse and give that path (docs/performance.md, "
            "`Disks`)."
        )
