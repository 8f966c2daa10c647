"""The fault suite, briefly: at least 30 SIGKILLs and some of every other fault. `make faults` runs it long."""

import signal

from faults import FAULTS, signalled, throw


def test_every_fault_is_survived(tmp_path):
    ten_kills = signalled(signal.SIGKILL, times=10)
    plan = [(name, job, ten_kills if name == "SIGKILL" else fault, weight) for name, job, fault, weight in FAULTS]
    tally, problems = throw(plan, seed=0, folder=tmp_path)
    assert not problems, "\n".join(problems)
    assert all(tally["SIGKILL", job][0] >= 10 for job in ("prepare", "pretrain", "fine-tune"))
    assert tally.keys() == {(name, job) for name, job, *_ in FAULTS}
