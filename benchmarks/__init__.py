"""maml_ext beside its peers, interleaved in one run: `python -m benchmarks` in the repository root."""
