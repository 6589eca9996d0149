"""Training commands: `python -m train.<command>` from the repository root, `python -m dspnet_fast.train.<command>` anywhere.

Modules in here import each other relatively, so that both names work.
"""
