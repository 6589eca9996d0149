"""Images as networks take them: ImageNet's mean and standard deviation taken out, whatever they are trained on."""

import functools

import torch

# ImageNet's, of RGB values from 0 to 1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def prepare(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Normalised images on the device: bytes are normalised there, what a backend has normalised stays as it is."""
    return batch if batch.is_floating_point() else normalize(batch.to(device, non_blocking=True))


def normalize(batch: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1 or 3, H, W] to float32 [N, 3, H, W] on the same device, channels-last: (value / 255 - MEAN) / STD.

    TypeError for anything but bytes.
    """
    if batch.dtype != torch.uint8:
        raise TypeError(f"normalize expects bytes (uint8), not {batch.dtype}")
    scale, shift = _scale_and_shift(batch.device)
    # bytes are the cheapest form to reorder in; one channel becomes three by broadcasting
    values = batch.contiguous(memory_format=torch.channels_last).float()
    return torch.addcmul(shift, values, scale).to(memory_format=torch.channels_last)


@functools.lru_cache
def _scale_and_shift(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept, because bringing them to a GPU makes the host wait for it."""
    centre = torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1)
    spread = torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1)
    return (1 / (255 * spread)).float().to(device), (-centre / spread).float().to(device)
