"""`--config.profile.steps=10:15`: an xprof trace of these steps, and the memory after them.

WORKDIR/profile/plugins/profile/TIME/*.xplane.pb   the trace; launch/profile.sh opens it
WORKDIR/profile/memory.prof                        live buffers by allocation site, for pprof
"""

import contextlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from saber_jax.runs import buckets, objects


def parse(window: str, steps: int) -> tuple[int, int]:
    """(first, last) of "first:last". Raises ValueError unless a run of `steps` has these steps."""
    match = re.fullmatch(r"(\d+):(\d+)", window)
    if match is None or not int(match[1]) < int(match[2]) <= steps:
        raise ValueError(
            "config.profile.steps must be first:last, steps of this run's "
            f"0 to {steps} with first < last, got {window!r}. For example 10:15 traces five."
        )
    return int(match[1]), int(match[2])


class Profile:
    """Traces steps `first` to `last` - 1 of process 0; all hosts of a pod run the same program.

    A process that starts between them traces the rest. `close` ends a trace that the run left open.
    """

    def __init__(self, window: str, workdir: str | Path, *, steps: int):
        """`window` is "first:last", or "" for no trace. Raises ValueError for anything else."""
        self._folder = self._local = Path(workdir) / "profile"
        self._first = self._last = -1
        self._began: int | None = None  # First step of the trace in progress.
        if not window:
            return
        first, last = parse(window, steps)
        if jax.process_index() == 0:
            self._first, self._last = first, last

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Context for the dispatch of a step; starts the trace at the first traced step."""
        if self._began is None and self._first <= step < self._last:
            if buckets.mounted(self._folder):  # The profiler cannot write to a bucket.
                self._local = Path(tempfile.mkdtemp(prefix="saber_profile_"))
            options = jax.profiler.ProfileOptions()
            # Python calls would hide the steps; annotations are still traced.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._local, profiler_options=options)
            self._began = step
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, result: Any) -> None:
        """Ends the trace when the `result` of the last traced step is ready."""
        if self._began is None or step != self._last - 1:
            return
        jax.block_until_ready(result)
        first, self._began = self._began, None
        jax.profiler.stop_trace()
        jax.profiler.save_device_memory_profile(self._local / "memory.prof")
        if self._local != self._folder:
            objects.upload_folder(self._folder, self._local)
            shutil.rmtree(self._local)
        print(f"traced steps {first} to {step}: launch/profile.sh {self._folder.parent}")

    def close(self) -> None:
        """Ends a trace whose last step was not reached, without the memory; none goes to a bucket.

        A process has one trace at a time, so an open one would fail the next after a rollback.
        """
        if self._began is None:
            return
        self._began = None
        jax.profiler.stop_trace()
        if self._local != self._folder:
            shutil.rmtree(self._local)
