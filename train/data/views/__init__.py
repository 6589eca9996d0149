"""Augmented views of images: their specification and random parameters, and the backends that compute them."""
