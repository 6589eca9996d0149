"""Verification: whether a provider computes the calls of a run correctly on this device.

calls.py        the operator calls of a model, recorded without computing, and random arguments for them
error_rule.py   the bound on a provider's error
check.py        one call of one provider: values, unwritten elements, determinism, memory
worker.py       the process that checks calls, because a faulty provider may end or block it
supervisor.py   starts workers, limits their time, and collects the outcomes
"""
