"""A plugin whose providers are faulty, each in its own way; conv_moments stays as it is."""

import os
import signal
import time

import torch

from dspnet_fast.ops import registry

kept = []


def correct(operator, *args):
    return registry.operators[operator].native(*args)


def wrong_by_one_percent(*args):
    return 1.01 * correct("norm_act", *args)


def wrong_at_odd_channels(*args):
    gradients = correct("norm_act_backward", *args)
    return (gradients[0] * (1 + args[1].shape[1] % 2), *gradients[1:])


def nan_in_one_element(*args):
    scale, shift = correct("scale_shift", *args)
    shift[-1, -1] = torch.nan
    return scale, shift


def not_deterministic(*args):
    gradients = correct("scale_shift_backward", *args)
    return (gradients[0] * (1 + 1e-7 * torch.randn_like(gradients[0])), *gradients[1:])


def segmentation_fault(*args):
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(*args):
    time.sleep(3600)


def leaking(*args):
    kept.append(correct("normalized_mse", *args))
    return kept[-1].clone()


def writing_to_its_input(*args):
    gradients = correct("normalized_mse_backward", *args)
    args[1].add_(1)
    return gradients


def writing_outside(*args):
    correct("lars_ema_step", *args)
    args[0].as_strided((1,), (1,), args[0].storage_offset() + len(args[0])).zero_()


for operator, run in {
    "norm_act": wrong_by_one_percent,
    "norm_act_backward": wrong_at_odd_channels,
    "scale_shift": nan_in_one_element,
    "scale_shift_backward": not_deterministic,
    "slim_batch_norm": segmentation_fault,
    "slim_batch_norm_backward": hanging,
    "normalized_mse": leaking,
    "normalized_mse_backward": writing_to_its_input,
    "lars_ema_step": writing_outside,
}.items():
    registry.operators[operator].provider("cpp", devices=("cpu",))(run)
