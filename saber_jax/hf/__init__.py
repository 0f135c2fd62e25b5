"""HuggingFace checkpoints of the Qwen2.5-Omni thinker, in and out."""
