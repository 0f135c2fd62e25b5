"""Mining of preference pairs."""
