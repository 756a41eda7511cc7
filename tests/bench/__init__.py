"""Benchmarks: `make bench`. Ratios in one run; nothing here is asserted."""
