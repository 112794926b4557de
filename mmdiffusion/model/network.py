# SPDX-License-Identifier: MIT
"""What the networks have in common as models of diffusers."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin


class Network(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A model of diffusers that owns the memory of its parameters, also where it was loaded from a file."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Any:
        """As that of diffusers, which maps the file: what is mapped changes with the file, ends the process where
        another one cuts it short, and lies at addresses for which BLAS rounds otherwise.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        network = loaded[0] if isinstance(loaded, tuple) else loaded
        with torch.no_grad():
            for x in (*network.parameters(), *network.buffers()):
                if x.device.type == "cpu" and type(x) in (torch.Tensor, torch.nn.Parameter):
                    x.data = x.data.clone()
        return loaded
