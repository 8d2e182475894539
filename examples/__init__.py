"""Runnable examples: ``python -m examples.demo`` from the root of the repository."""
