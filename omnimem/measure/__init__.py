"""Measure accuracy, memory and latency of selection methods: `omnimem compare` and `omnimem bench`."""
