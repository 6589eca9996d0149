"""dspnet-fast: one self-supervised run trains a family of networks that share their weights."""
