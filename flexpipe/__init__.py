"""flexpipe: batch inference for language models that are bigger than the accelerator."""

__version__ = "0.1.0"
