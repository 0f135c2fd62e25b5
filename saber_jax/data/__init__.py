"""Clips on disk to model-ready arrays: records, tokenizer, prompts, positions, media."""
