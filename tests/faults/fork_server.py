"""Starts pretraining processes in a fraction of a second: imports everything once, and forks a child for each command.

A child is a process like any other: it has its own memory, files and process id, takes signals and can be killed.
The server reads requests as lines of JSON. {"argv": [...], "before": Python code to execute before the command,
"printed": file to append the output to} starts a child and returns its process id. {"wait": process id} waits for its
end and returns its exit code, which is negative after a signal.
"""

import ctypes
import json
import os
import signal
import sys
import traceback

import torch
import torch.utils.tensorboard  # noqa: F401  (imported late by the commands, and slow)

from train import pretrain

PR_SET_PDEATHSIG = 1  # of prctl(2)


def child(argv: list[str], before: str, printed: str) -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # children end with the server
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
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
    torch.set_num_threads(1)  # a fork does not copy other threads
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(child(**request))
        print(answer, flush=True)


if __name__ == "__main__":
    main()
