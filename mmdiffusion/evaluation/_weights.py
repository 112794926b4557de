# SPDX-License-Identifier: MIT
"""Published weights into a network."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

Source = str | os.PathLike[str] | Mapping[str, Tensor]


def fill(network: nn.Module, source: Source, prefix: str = "") -> None:
    """Load a state dict, or a file of one that may run no code, into a network for evaluation.

    Args:
        prefix: of the keys that are the network's; others belong to other networks of the same file.

    Raises:
        OSError, TypeError, ValueError: if it cannot be read, or its keys or shapes are not those of the network.
    """
    if not isinstance(source, Mapping):
        from mmdiffusion.checkpoints import read

        source = read(source)
    found = {key.removeprefix(prefix): x for key, x in source.items() if key.startswith(prefix)}
    expected = network.state_dict()
    lacking = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in expected]
    others = [key for key in expected if key in found and found[key].shape != expected[key].shape]
    sentences = [
        f"{len(keys)} {what} ({', '.join(prefix + key for key in keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("are lacking", lacking), ("are unknown", unknown), ("have another shape", others))
        if keys
    ]
    if sentences:
        raise ValueError(
            f"the weights do not fit {type(network).__name__}: of its {len(expected)} keys {'; '.join(sentences)}"
        )
    network.load_state_dict({**expected, **found})
    network.eval().requires_grad_(False)
