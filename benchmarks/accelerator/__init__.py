"""Training steps and generation on the accelerator that is here, and transformers' beside them."""
