"""SABER-LLM in JAX: structured evidence decomposition, then consistency-aware DPO."""
