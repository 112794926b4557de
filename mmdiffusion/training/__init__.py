# SPDX-License-Identifier: MIT
"""Training: `train` yields its state after each step; how a state is kept; what is drawn and minimised."""

from mmdiffusion.training.loop import train
from mmdiffusion.training.recipe import Recipe
from mmdiffusion.training.state import State, States

__all__ = ["Recipe", "State", "States", "train"]
