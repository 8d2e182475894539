"""Triton kernels, installed as ``maml_ext.kernels``. None yet: on a GPU the reference engine runs."""
