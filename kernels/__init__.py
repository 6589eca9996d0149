"""Triton kernels, one file per operator, each named as in dspnet_fast/ops, where the operators are specified.

Installed as dspnet_fast.kernels; in the repository also importable as kernels, so modules import each other relatively.
An operator's module has a launcher with the operator's name and signature, and `accepts`, which checks whether the
kernels support given arguments.
"""
