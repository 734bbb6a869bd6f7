"""Benchmarks of heliostat: `benchmarks.speed` against peers, `benchmarks.claims` against the papers' baselines."""
