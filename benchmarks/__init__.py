"""Benchmarks: `python -m benchmarks.NAME [--quick]`, each against a peer or a measured limit.

A benchmark prints its measurements; its last line is one JSON object, written by `finish`. Machines
are noisy, so values are medians, and the ratio to the peer is the result.
"""

import saber_jax  # noqa: F401  Decides before jax is imported where jax looks for devices.
