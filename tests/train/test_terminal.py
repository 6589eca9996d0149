"""Output whose reader exits, or whose encoding lacks a character, does not end a command."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from train import cli
def main(argv):
    for line in range(20000):
        print("line", line, "± 1", "stra\\udcdfe", "字", flush=line % 100 == 0)
    open(argv[0], "w").write("done")
cli.run(main)
"""


def run(tmp_path, **options):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "result")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_command_goes_on_after_the_reader_of_its_output_has_exited(tmp_path):
    process = run(tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""
    assert (tmp_path / "result").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_command_goes_on_when_the_disk_of_its_output_is_full(tmp_path):
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "result")], stdout=full, timeout=60)
    assert ended.returncode == 0 and (tmp_path / "result").read_text() == "done"


def test_closed_output_does_not_reach_a_file_that_is_opened_later(tmp_path):
    program = PROGRAM.replace('.write("done")', "; import os; os.write(1, b'noise')")
    command = [sys.executable, "-c", program, str(tmp_path / "result")]
    ended = subprocess.run(command, preexec_fn=lambda: os.closerange(0, 2), stderr=subprocess.PIPE, timeout=60)
    assert ended.returncode == 0 and ended.stderr == b""
    assert (tmp_path / "result").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_output_lacks_are_replaced(tmp_path, encoding):
    process = run(tmp_path, env={"PYTHONIOENCODING": encoding, "PYTHONPATH": "."})
    output, errors = process.communicate(timeout=60)
    expected = {"ascii": "+- 1 stra\\xdfe ?", "latin-1": "± 1 stra\\xdfe ?", "utf-8": "± 1 stra\\xdfe 字"}[encoding]
    assert output.decode(encoding).splitlines()[7] == f"line 7 {expected}"
    assert process.returncode == 0 and errors == b""
