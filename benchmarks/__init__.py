"""Measurements, from the repository root: `python -m benchmarks.<name>`. They print; they assert nothing."""
