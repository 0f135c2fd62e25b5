"""Scores of a trained model on benchmarks, and the report of a run."""
