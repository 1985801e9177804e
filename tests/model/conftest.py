from tests.hf import hf_checkpoint, hf_reference  # noqa: F401  (fixtures)
