"""Measurements of flowray that end in a ratio: run `python -m benchmarks` in a checkout."""
