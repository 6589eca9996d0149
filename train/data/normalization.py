"""Normalisation of 8-bit images with ImageNet's mean and standard deviation."""

import functools

import torch

# of ImageNet's RGB values from 0 to 1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def prepare(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a batch to the device, in channels-last memory, and normalise it there unless it is float and normalised."""
    batch = batch.to(device, non_blocking=True)
    return batch.contiguous(memory_format=torch.channels_last) if batch.is_floating_point() else normalize(batch)


def normalize(batch: torch.Tensor) -> torch.Tensor:
    """Compute (value / 255 - MEAN) / STD.

    Args:
        batch: uint8 [N, 1 or 3, H, W].

    Returns:
        float32 [N, 3, H, W] in channels-last memory on the same device.

    Raises:
        TypeError: the batch is not uint8.
    """
    if batch.dtype != torch.uint8:
        raise TypeError(f"normalize expects uint8, not {batch.dtype}")
    scale, shift = _scale_and_shift(batch.device)
    # reorder while the values are bytes, which is cheapest; broadcasting makes three channels of one
    values = batch.contiguous(memory_format=torch.channels_last).float()
    return torch.addcmul(shift, values, scale).to(memory_format=torch.channels_last)


@functools.lru_cache
def _scale_and_shift(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cached, because copying them to a GPU synchronises the host."""
    mean = torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1)
    deviation = torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1)
    return (1 / (255 * deviation)).float().to(device), (-mean / deviation).float().to(device)
