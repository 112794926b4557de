# SPDX-License-Identifier: MIT
"""The networks: configuration, blocks, the coupled U-Net."""
