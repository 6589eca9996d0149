"""Training commands: `python -m train.<command>` from the repository root, `dspnet_fast.train.<command>` anywhere.

Modules in here import each other relatively, so that both names work.
"""

import os

SPIN_COUNT = 20_000
"""Limit of the threads' spinning while they wait for each other (GNU OpenMP's GOMP_SPINCOUNT), a fraction of a
millisecond. With the default, some milliseconds, a step beside a busy process takes three times as long as alone
(`python -m benchmarks.contention`)."""

if "OMP_WAIT_POLICY" not in os.environ:  # GNU OpenMP reads both once, when torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
