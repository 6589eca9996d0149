"""Ctrl-C ends every command with one line and exit code 130, whenever it comes."""

import os
import signal
import subprocess
import sys

import pytest

from train import cli
from train.data.loader import BatchDataset, make_loader
from train.run.interruption import NOTHING
from train.run.run_directory import after_ctrl_c

PROGRAM = """
import atexit, time
from train import cli

def main(argv):
    print("ready", flush=True)
    time.sleep(60)

def end():
    print("ending", flush=True)
    time.sleep(60)

if WAITS: atexit.register(end)
cli.run(main, interrupted="nothing was written")
"""


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's "&" ignores Ctrl-C
    )


def interrupt(process, line):
    """Send Ctrl-C once the process has printed a line."""
    assert process.stdout.readline() == f"{line}\n"
    process.send_signal(signal.SIGINT)


def test_ctrl_c_gives_one_line_and_exit_code_130():
    process = start("-c", PROGRAM.replace("WAITS", "False"))
    interrupt(process, "ready")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED == 130
    assert errors == "error: interrupted; nothing was written\n"


def test_second_ctrl_c_ends_a_command_that_takes_long_to_end():
    process = start("-c", PROGRAM.replace("WAITS", "True"))
    interrupt(process, "ready")
    interrupt(process, "ending")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT  # 130 in a shell
    assert errors == "error: interrupted; nothing was written\n"


def test_ctrl_c_during_imports_gives_no_traceback(tmp_path):
    (tmp_path / "jsonargparse.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    process = start("-m", "train.report", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.getcwd()}")
    interrupt(process, "importing")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and errors == ""


def test_package_imported_by_a_program_leaves_its_ctrl_c():
    code = "import signal, train; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert start("-c", code).communicate(timeout=60)[0] == "True\n"


def test_ctrl_c_in_a_destructor_ends_the_command():
    destructor = "import signal\nclass Last:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
    program = destructor + PROGRAM.replace("time.sleep(60)\n\ndef", "Last()\n    while True: time.sleep(0.01)\n\ndef")
    process = start("-c", program.replace("WAITS", "False"))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "error: interrupted; nothing was written\n"


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")
def test_workers_are_forked_while_ctrl_c_waits(monkeypatch):
    class Masks(BatchDataset):
        def batch(self, items, unreadable):
            return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    monkeypatch.setattr("train.data.loader._context", lambda workers: "fork")
    assert list(make_loader(Masks(), [[0], [1]], workers=1)) == [True, True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_message_of_main_replaces_that_of_the_command(capsys):
    def main(argv):
        raise KeyboardInterrupt(*argv)

    for argv, said in ((), "the same command continues from what was saved"), (("saved",), "saved"):
        with pytest.raises(SystemExit) as ended:
            cli.run(main, argv)
        assert ended.value.code == 130 and capsys.readouterr().err == f"error: interrupted; {said}\n"


def test_interrupted_run_says_what_was_saved(finished, tmp_path):
    assert after_ctrl_c(tmp_path) == NOTHING
    assert after_ctrl_c(finished) == f"saved up to step 20: continue with --resume --out {finished}"
    (tmp_path / "config.yaml").touch()
    assert after_ctrl_c(tmp_path) == f"no step was saved: continue with --resume --out {tmp_path}"
