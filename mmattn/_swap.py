# SPDX-License-Identifier: MIT
"""Put our modules in the place of the published ones inside a model."""

from __future__ import annotations

from torch import nn

from mmattn.modules import RandomShiftAttention, missing_published_attributes


def swap(model: nn.Module) -> int:
    """Replace, in place, each cross-attention block of the published MM-Diffusion code by `RandomShiftAttention`.

    A block is known by its attributes, not by its class. The new module works on the block's weights and keeps their
    dtype, device and requires_grad, the train or eval state, and the groups and eps of the norms. Make the optimizer
    afterwards: the parameters are new objects.

    Args:
        model: the model that holds the blocks, at any depth. A block registered in several places stays one module.

    Returns:
        The number of different blocks replaced.

    Raises:
        ValueError: if `model` is itself such a block, which cannot be replaced in place.

    Example:
        >>> replaced = mmattn.swap(unet)  # doctest: +SKIP
    """
    if not missing_published_attributes(model):
        raise ValueError(
            f"model is itself a cross-attention block ({type(model).__name__}), which cannot be replaced in place; "
            "use mmattn.RandomShiftAttention.from_published(model)"
        )
    replaced: dict[nn.Module, RandomShiftAttention] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would skip a second registration
            if child is None or missing_published_attributes(child):
                continue
            if child not in replaced:
                replaced[child] = RandomShiftAttention.from_published(child)
            setattr(parent, name, replaced[child])
    return len(replaced)
