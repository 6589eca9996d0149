"""Triton kernels, one file per operator, each named as in dspnet_fast/ops, where the operators are specified.

Installed as dspnet_fast.kernels; in the repository also importable as kernels. Modules in here therefore import each
other relatively. Each has a launcher with the operator's name and signature, and `accepts`, which says what it takes.
"""
