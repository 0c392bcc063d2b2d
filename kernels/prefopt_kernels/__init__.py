"""Triton kernels of prefopt's hot path. Imports torch and triton, and nothing of prefopt.

`prefopt.dispatch` is the only module that imports from here, and only when a kernel is asked for.
"""
