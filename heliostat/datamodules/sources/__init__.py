"""Real data that needs no download."""
