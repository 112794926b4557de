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
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children() would skip a second registration
        if child is not None and not missing_published_attributes(child)
    ]
    # All are made before any is put in place, so that one that cannot be made leaves the model as it was.
    replacements = {child: RandomShiftAttention.from_published(child) for child in {child for *_, child in places}}
    for parent, name, child in places:
        setattr(parent, name, replacements[child])
    return len(replacements)
