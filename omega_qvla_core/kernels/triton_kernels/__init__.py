"""Triton kernels of quantized products, and of what happens between them.

Importing a module of this package other than ``layout`` needs triton, which is optional: ``kernels.backend("triton")``
says so where it is missing. Every kernel also runs in Triton's interpreter, on a CPU, and compiles for GPUs that are
not there; both are tested.
"""
