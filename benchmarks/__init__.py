"""Benchmarks: `python -m benchmarks.NAME [--quick]`, each against a peer or a limit it measures.

A benchmark prints what it measures as it goes; its last line is one JSON object, by `finish`.
Machines are noisy, so values are medians, and what counts is the ratio.
"""

import saber_jax  # noqa: F401  Decides before jax is imported where jax looks for devices.
