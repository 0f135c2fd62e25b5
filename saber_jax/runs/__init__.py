"""Infrastructure of long jobs: identity, journals, shares of the work, several processes."""
