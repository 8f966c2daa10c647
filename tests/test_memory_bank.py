"""The memory bank: its update against the paper's rule, and its negatives."""

import torch

from memory_bank import MemoryBank
from runtime.randomness import make_generator


def make_bank(count=50, train_count=40, beta=0.5):
    vectors = torch.randn(count, 128, generator=make_generator("cpu", 1))
    return MemoryBank(vectors, train_count, beta)


def row_of(bank, vector):
    """Which row of the bank a vector is."""
    return (bank.vectors == vector).all(1).nonzero().item()


def test_update_is_the_paper_s_and_touches_only_the_batch():
    bank = make_bank(beta=0.3)
    before = bank.vectors.clone()
    index = torch.tensor([7, 0, 33])
    embeddings = (5 * torch.randn(3, 128)).bfloat16()

    bank.update(index, embeddings)
    assert bank.vectors.dtype == torch.float32

    positions = {row: position for position, row in enumerate(index.tolist())}
    for row in range(50):
        if row in positions:
            f = embeddings[positions[row]].double()
            f = f / (f * f).sum().sqrt()
            expected = 0.3 * before[row].double() + 0.7 * f
            expected = expected / (expected * expected).sum().sqrt()
            updated = bank.vectors[row].double()
            torch.testing.assert_close(updated, expected, rtol=1e-5, atol=1e-6)
        else:
            assert (bank.vectors[row] == before[row]).all()


def test_its_state_is_the_vectors():
    bank = make_bank()
    other = MemoryBank(torch.randn(50, 128), 40, 0.5)
    other.load_state_dict(bank.state_dict())
    assert list(bank.state_dict()) == ["vectors"]
    assert other.vectors.equal(bank.vectors)
    assert not list(bank.parameters())


def test_every_image_has_exactly_so_many_other_training_images():
    bank = make_bank()
    index = torch.arange(0, 50, 3)  # training and validation images
    for step in range(20):
        generator = make_generator("cpu", step)
        vectors, masks = bank.negatives(bank.draw(12, generator), index)

        rows = [row_of(bank, vector) for vector in vectors]
        assert len(set(rows)) == 13
        assert max(rows) < 40, "a validation image is never a negative"

        assert (masks.sum(1) == 1).all()
        for image, mask in zip(index.tolist(), masks.tolist(), strict=True):
            pairs = zip(rows, mask, strict=True)
            visible = [row for row, is_masked in pairs if not is_masked]
            assert image not in visible
            assert len(visible) == 12


def test_all_others_when_as_many_are_asked_for():
    bank = make_bank()
    generator = make_generator("cpu", 0)
    vectors, mask = bank.negatives(bank.draw(39, generator), torch.tensor([5]))
    visible = {row_of(bank, vector) for vector in vectors[~mask[0]]}
    assert visible == set(range(40)) - {5}


def test_negatives_are_uniform():
    bank = make_bank()
    counts = torch.zeros(40)
    steps = 1500
    for step in range(steps):
        # What the bank draws.
        rows = torch.randperm(40, generator=make_generator("cpu", step))[:11]
        generator = make_generator("cpu", step)
        vectors, mask = bank.negatives(bank.draw(10, generator), torch.tensor([0]))
        assert (vectors == bank.vectors[rows]).all()
        counts[rows[~mask[0]]] += 1

    assert counts[0] == 0
    expected = steps * 10 / 39
    chi_square = ((counts[1:] - expected) ** 2 / expected).sum().item()
    assert chi_square < 70  # 38 degrees of freedom: 1 in 1,000
