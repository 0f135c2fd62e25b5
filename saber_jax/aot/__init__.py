"""What the TPU compiler says about a config, on a machine without a TPU."""
