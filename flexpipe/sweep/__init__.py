"""Grids of policies and workloads: every point measured or predicted once, and compared."""
