"""A lean trainer for RLHF on top of `rlhf_kernels`: one algorithm, one file that reads top to bottom."""

__version__ = "0.1.0"
