"""flexpipe beside its peers on one checkpoint: sweeps, comparisons, and the machine's bounds."""
