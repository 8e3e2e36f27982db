"""The reference GPT and its presets."""

from .config import PRESETS, GPTConfig
from .gpt import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig"]
