"""Benchmarks: `make bench`. Ratios in one run; nothing here is asserted.

Each module but `cluster` is a part of `python -m tests.bench`, and runs alone, too: `python -m tests.bench.packets`.
"""
