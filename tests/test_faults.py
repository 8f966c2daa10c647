"""The fault suite, briefly: at least 30 SIGKILLs and some of every other fault. `make faults` runs it long."""

from faults import FAULTS, SIGKILL, throw


def test_every_fault_is_survived(tmp_path):
    kills = [entry for entry in FAULTS if entry[2] is SIGKILL] * 4
    plan = kills[:10] + [entry for entry in FAULTS if entry[2] is not SIGKILL]
    tally, problems = throw(plan, seed=0, folder=tmp_path)
    assert not problems, "\n".join(problems)
    assert sum(tried for (name, _), (tried, _, _) in tally.items() if name == "SIGKILL") >= 30
    assert {name for name, _ in tally} == {name for name, *_ in FAULTS}
