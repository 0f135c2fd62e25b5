"""What every long job needs once: identity, journals, shares of the work, several processes."""
