"""Image datasets: `open_images` finds one by name or path; each module reads one format."""

from .registry import DatasetSize, data_folder, dataset_size, exists_locally, open_images

__all__ = ["DatasetSize", "data_folder", "exists_locally", "open_images", "dataset_size"]
