"""Benchmarks: the project beside its peers, in one process tree."""
