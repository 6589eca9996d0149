"""Operators, one file each: a plain PyTorch body that is the specification, and faster providers of the same thing."""

from . import registry
from .ema_update import ema_update
from .lars_ema_step import lars_ema_step
from .normalized_mse import normalized_mse

__all__ = ["ema_update", "lars_ema_step", "normalized_mse", "registry"]
