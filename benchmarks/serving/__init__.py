"""noria and its peers, side by side on one core: `python -m benchmarks.serving --help`."""
