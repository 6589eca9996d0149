"""Object detection and instance segmentation with networks of a family."""
