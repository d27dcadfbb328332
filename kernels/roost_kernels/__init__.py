"""Kernels of the engine: each public op beside its slow reference twin."""
