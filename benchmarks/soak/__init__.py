"""The long proofs: swaps under load and kills at random moments, counted. `python -m benchmarks.soak --help`."""
