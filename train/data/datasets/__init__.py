"""Image datasets: `open_images` finds one by name or path; each module reads one format."""

from .registry import SetSize, data_folder, is_here, open_images, size_of

__all__ = ["SetSize", "data_folder", "is_here", "open_images", "size_of"]
