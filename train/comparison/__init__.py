"""Comparison of a jointly pretrained family with separately pretrained networks."""
