"""The fault suite, briefly: at least 30 SIGKILLs and some of every other fault. `make faults` runs it long."""

from functools import partial

from faults import FAULTS, SIGINT, SIGKILL, SIGTERM, throw

TIMES = {SIGKILL: 10, SIGTERM: 1, SIGINT: 1}


def test_every_fault_is_survived(tmp_path):
    plan = [(name, job, partial(f, times=TIMES[f]) if f in TIMES else f, weight) for name, job, f, weight in FAULTS]
    tally, problems = throw(plan, seed=0, folder=tmp_path)
    assert not problems, "\n".join(problems)
    assert sum(tried for (name, _), (tried, _, _) in tally.items() if name == "SIGKILL") >= 30
    assert tally.keys() == {(name, job) for name, job, *_ in FAULTS}
