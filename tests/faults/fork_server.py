"""Starts pretraining processes in a fraction of a second: imports everything once, and forks a child for each command.

A child is a process like any other: it has its own memory, files and process id, takes signals and can be killed.
The fork_server reads lines of JSON. {"argv": [...], "before": Python code to run before the command, "printed": file to
append to} is answered with the child's process id; {"wait": process id}, when it has ended, with its exit code, which
is negative after a signal.
"""

import ctypes
import json
import os
import signal
import sys
import traceback

import torch
import torch.utils.tensorboard  # noqa: F401  (what the commands import late, and slowly)

from train import pretrain

PR_SET_PDEATHSIG = 1  # prctl(2). Python has no name for it


def child(argv: list[str], before: str, printed: str) -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the fork_server
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from its background jobs
    try:
        exec(before, {})
        pretrain.main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    torch.set_num_threads(1)  # others would not survive a fork
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(child(**order))
        print(answer, flush=True)


if __name__ == "__main__":
    main()
