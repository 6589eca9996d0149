"""Training commands: `python -m train.<command>` from the repository root, `dspnet_fast.train.<command>` anywhere.

Modules in here import each other relatively, so that both names work.
"""

import sys
from pathlib import Path

from .run.interruption import ctrl_c_kills

if sys.argv[0] == "-m" or Path(sys.argv[0]).name.startswith("dspnet-"):
    ctrl_c_kills()  # importing torch takes seconds; a command then handles Ctrl-C itself
