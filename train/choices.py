"""What several parts know an option by, without what it stands for."""

from typing import Literal

BACKENDS = ("torchvision", "dali-cpu", "dali-gpu")  # that make batches of views

Workers = int | Literal["auto"]  # processes that load images
MOST_WORKERS = 8  # that "auto" starts
FEW_IMAGES = 256  # up to here starting workers costs more than they save
WORKERS_HELP = (
    f"data loading processes: a number, 0 being none, or auto: one per core, {MOST_WORKERS} at most, "
    f"none for up to {FEW_IMAGES} images"
)
