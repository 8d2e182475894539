"""Triton kernels and the engine that runs network programs by them, installed as ``maml_ext.kernels``.

This module imports no triton; the others do.
"""
