"""Operators, one file each: a body in plain PyTorch, which is the specification, and faster providers."""

from . import registry
from .adamw_ema_step import adamw_ema_step
from .conv_moments import conv_moments
from .conv_norm import conv_norm
from .ema_update import ema_update
from .lars_ema_step import lars_ema_step
from .norm_act import norm_act
from .norm_act_pool import norm_act_pool
from .normalized_mse import normalized_mse
from .scale_shift import scale_shift
from .slim_batch_norm import slim_batch_norm
from .slim_conv2d import slim_conv2d
from .slim_linear import slim_linear

__all__ = [
    "adamw_ema_step",
    "conv_moments",
    "conv_norm",
    "ema_update",
    "lars_ema_step",
    "norm_act",
    "norm_act_pool",
    "normalized_mse",
    "registry",
    "scale_shift",
    "slim_batch_norm",
    "slim_conv2d",
    "slim_linear",
]
