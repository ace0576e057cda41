"""infer.py as a process: signals, a closed pipe, closed streams."""

import signal
import subprocess
import sys

import pytest
from processes import ROOT, running, waits_long

pytestmark = pytest.mark.slow

INFER = [sys.executable, str(ROOT / "infer.py"), "--device", "cpu"]
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def test_closed_pipe(tiny_home):
    """`| head` closes it while the second of several texts is written."""
    words = [*INFER, "--max_new_tokens", "3000", "--num_samples", "3", "--batch_size", "1"]
    with running(words, cwd=tiny_home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert any(b"--- sample 2" in line for line in process.stdout)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait() == 141
    assert "Traceback" not in err
    assert "error" not in err


def test_ctrl_c_in_interactive_mode(tiny_home):
    """The first two end a text; the third comes while the next prompt is awaited, and ends the program."""
    words = [INFER[0], "-u", *INFER[1:], "--max_new_tokens", "1000000", "--interactive", "--greedy", "--ignore_eot"]
    with running(words, cwd=tiny_home, **PIPES) as process:
        for prompt in (b"99 green", b"98 green"):
            process.stdin.write(prompt + b"\n")
            process.stdin.flush()
            assert process.stdout.read(30).startswith(prompt)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline().endswith(b"\n")
        while not waits_long(process.pid):
            pass
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=90)[1]
        assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(tiny_home, closed):
    words = f"'{INFER[0]}' '{INFER[1]}' - --device cpu --max_new_tokens 3 {closed}"
    done = subprocess.run(["sh", "-c", words], cwd=tiny_home, capture_output=True, text=True, input="green")
    assert "Traceback" not in done.stderr + done.stdout
    assert "parameters" not in done.stdout
    assert done.returncode == 0, done
