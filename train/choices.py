"""What several parts know an option by, without what it stands for."""

from typing import Literal

BACKENDS = ("torchvision", "dali-cpu", "dali-gpu")  # that make batches of views
Workers = int | Literal["auto"]  # processes that load images
