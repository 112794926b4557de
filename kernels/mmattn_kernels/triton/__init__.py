# SPDX-License-Identifier: MIT
"""Triton kernels, one file per op. Importing this package imports nothing else."""
