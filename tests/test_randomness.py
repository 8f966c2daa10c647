"""Random numbers: a function of the key, and of the whole key."""

import torch

from runtime import randomness
from runtime.randomness import VIEWS, derived_seed, make_generator

PURPOSES = [
    getattr(randomness, name)
    for name in ("SPLIT", "ORDER", "VIEWS", "NEGATIVES", "BANK", "INITIAL_WEIGHTS")
]


def test_a_seed_is_the_same_for_ever():
    """Else no checkpoint of an earlier version could be continued exactly."""
    assert derived_seed(7, VIEWS, 3) == 1684239238610986860
    assert PURPOSES == [0, 1, 2, 3, 4, 5]


def test_all_keys_of_a_run_differ():
    """In their last 32 bits, too: the CPU's generator takes no more of a seed."""
    keys = []
    for seed in (0, 1, 2, 2**32 - 1):
        for purpose in PURPOSES:
            keys.append((seed, purpose))
            keys += [(seed, purpose, epoch) for epoch in range(1, 12)]
            for epoch in range(1, 12):
                keys += [(seed, purpose, epoch, step) for step in range(1, 12)]
    seeds = [derived_seed(*key) for key in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(keys)


def test_a_generator_is_that_of_its_key_and_device(monkeypatch):
    expected = torch.Generator().manual_seed(derived_seed(7, 1, 2))
    actual = make_generator("cpu", 7, 1, 2)
    torch.rand(3)  # the global generator is of no account
    numbers = [torch.rand(5, generator=one) for one in (expected, actual)]
    assert numbers[0].equal(numbers[1])

    class Noted:
        def __init__(self, device):
            self.device = device

        def manual_seed(self, seed):
            return self

    monkeypatch.setattr(torch, "Generator", Noted)
    card = torch.device("cuda", 1)
    assert make_generator(card, 7).device == card
