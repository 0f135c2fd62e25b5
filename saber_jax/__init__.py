"""SABER-LLM in JAX: structured evidence decomposition, then consistency-aware DPO."""

from saber_jax.runs import platforms

# jax reads JAX_PLATFORMS when it is imported, which every module of this package may do.
platforms.keep_libtpu_quiet()
