"""`python -m dspnet_fast.select`: the command dspnet-select, which verifies kernels and races formulations."""

import importlib
import importlib.util

if __name__ == "__main__":
    # the commands are a package beside this one in a source folder, and a part of it in an installation
    installed = importlib.util.find_spec("dspnet_fast.train") is not None
    importlib.import_module("dspnet_fast.train.select" if installed else "train.select").main()
