"""SABER-LLM in JAX: structured evidence decomposition, then consistency-aware DPO."""

from saber_jax.runs import platforms

# jax reads these variables when it is imported, which every module of this package may do.
platforms.keep_libtpu_quiet()
platforms.keep_collectives_out_of_the_cache()
