"""Anyone's clips to records."""
