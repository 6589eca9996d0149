"""dspnet-fast: one self-supervised run trains a family of networks that share their weights."""

__version__ = "0.1.0"
