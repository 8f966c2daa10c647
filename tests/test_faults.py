"""A few kills of every script and a full disk, each with the thin trunk. `make faults` runs the whole suite long."""

from functools import partial

import pytest
from faults import SIGKILL, full_disk, throw

PLAN = [("SIGKILL", job, partial(SIGKILL, times=2)) for job in ("pretrain", "fine-tune", "prepare")]
PLAN += [("full disk", "pretrain", full_disk)]


@pytest.mark.slow
def test_faults_are_survived(tmp_path):
    tally, problems = throw([(*fault, 1) for fault in PLAN], seed=0, folder=tmp_path, thin=True)
    assert not problems, "\n".join(problems)
    tried = {key: counts[0] for key, counts in tally.items()}
    assert tried == {(name, job): 2 if name == "SIGKILL" else 1 for name, job, _ in PLAN}
