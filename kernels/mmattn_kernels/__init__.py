# SPDX-License-Identifier: MIT
"""Device code of mmattn: Triton kernels and the CPU extension. Import `mmattn`, not this."""
