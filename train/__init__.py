"""Training commands: `python -m train.<command>` from the repository root, `dspnet_fast.train.<command>` anywhere.

Modules in here import each other relatively, so that both names work.
"""
