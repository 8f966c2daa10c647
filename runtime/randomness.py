"""Random numbers as a function of (seed, purpose, epoch, step), without a state.

So a run that is resumed at any step draws what the undisturbed run would have drawn.
"""

import numpy as np
import torch

# One independent stream of random numbers per purpose.
SPLIT = 0
ORDER = 1
VIEWS = 2
NEGATIVES = 3
BANK = 4
INITIAL_WEIGHTS = 5


def derived_seed(*key):
    """A well-mixed seed of 63 bits from whole numbers, such as (seed, VIEWS, epoch).

    Zeros at the end of a key do not count: (0, 4) and (0, 4, 0) give the same seed. So
    callers must give all keys of one purpose the same length.
    """
    words = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(words[0] >> 1)


def make_generator(device, *key):
    """A torch.Generator that is a function of `key` alone.

    Different kinds of device make different numbers from the same key.
    """
    return torch.Generator(device).manual_seed(derived_seed(*key))
