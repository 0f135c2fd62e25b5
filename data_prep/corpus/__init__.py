"""The embedded corpus saber_mini."""
