"""Clips and annotations -> records."""
