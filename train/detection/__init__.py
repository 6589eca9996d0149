"""Mask R-CNN on a network of a family."""
