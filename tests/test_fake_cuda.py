"""Both training scripts on pretended CUDA tensors, by fake_cuda.py.

What a machine without a GPU can tell about one with it.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

WHY_NOT = None
if torch.cuda.is_available():
    WHY_NOT = "there is a GPU: test_cuda.py uses it"
elif not torch.backends.cuda.is_built():
    WHY_NOT = "this torch is built for CPUs alone"
elif not torch.__version__.startswith("2.11."):
    WHY_NOT = f"fake_cuda.py is written for torch 2.11, and this is {torch.__version__}"
elif sys.platform != "linux":
    WHY_NOT = "fake_cuda.py knows the names of Linux libraries"
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def pretend(what):
    """Standard output of fake_cuda.py, in a process of its own: it changes torch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/fake_cuda.py"), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_step_waits_for_the_device_and_no_operator_meets_two_devices():
    out = pretend("check")
    runs = re.findall("PIRL, .*, res18, cuda, ", out)
    assert len(runs) == 10, "the runs took place on the pretended device"
    assert out.count("note: the images stay on the host") == 1, "of a small card"
    assert out.endswith(
        "no step waits for the device, and no operator met tensors of two devices\n"
    )


@pytest.mark.slow
def test_planted_defects_are_found():
    out = pretend("defects")
    assert "NOT FOUND" not in out
    assert out.count("cuda:0 and cpu") == 1
    assert out.count(" at pirl_stl_train_test.py:") == 2
