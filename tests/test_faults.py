"""A few faults of every script, with the thin trunk; `make faults` throws many more."""

from functools import partial

import pytest
from faults import Fault, full_disk, sigkill, throw

KILLED_TWICE = partial(sigkill, times=2)
PLAN = [
    Fault("SIGKILL", "pretrain", KILLED_TWICE, times=2),
    Fault("SIGKILL", "fine-tune", KILLED_TWICE, times=2),
    Fault("SIGKILL", "prepare", KILLED_TWICE, times=2),
    Fault("full disk", "pretrain", full_disk),
]


@pytest.mark.slow
def test_faults_are_survived(tmp_path):
    counts, problems = throw(PLAN, seed=0, folder=tmp_path, thin=True)
    assert not problems, "\n".join(problems)
    tried = {key: count.tried for key, count in counts.items()}
    assert tried == {(fault.name, fault.job): fault.times for fault in PLAN}
