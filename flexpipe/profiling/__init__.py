"""Measuring what a machine can do: links, products, attention, overheads, what disturbs what."""
