"""Compiles a config for a TPU, on a machine without a TPU, and reports memory and cost."""
