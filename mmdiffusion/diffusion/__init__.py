# SPDX-License-Identifier: MIT
"""The diffusion process on top of a network: schedulers, the sampling loop, pipelines."""
