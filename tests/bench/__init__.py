"""Benchmarks: JSON lines on stdout, one figure a line, its peer measured in the same run.

One rule for all: the daemon runs as `hive-core serve` starts it, clients in one other process, 200-byte distinct
bodies, one request outstanding per sender, both sides on the same file system, interleaved, medians, rows counted.
"""
