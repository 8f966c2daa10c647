"""Two kills of pretraining, with the thin trunk. `make faults` runs the whole suite long."""

from functools import partial

import pytest
from faults import SIGKILL, throw


@pytest.mark.slow
def test_kills_are_survived(tmp_path):
    tally, problems = throw([("SIGKILL", "pretrain", partial(SIGKILL, times=2), 1)], seed=0, folder=tmp_path, thin=True)
    assert not problems, "\n".join(problems)
    assert {key: counts[0] for key, counts in tally.items()} == {("SIGKILL", "pretrain"): 2}
