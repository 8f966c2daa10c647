import run_helpers as rh
import torch

from memory_bank import MemoryBank


def bank(count=50, train=40, beta=0.5):
    return MemoryBank(torch.randn(count, 128, generator=rh.generator("cpu", 1)), train, beta)


def test_update_is_the_paper_s_and_touches_only_the_batch():
    memory = bank(beta=0.3)
    before = memory.vectors.clone()
    index, vectors = torch.tensor([7, 0, 33]), 5 * torch.randn(3, 128)
    memory.update(index, vectors)
    for row in range(50):
        expected = before[row].double()
        if row in index:
            fresh = vectors[index.tolist().index(row)].double()
            expected = 0.3 * expected + 0.7 * fresh / (fresh * fresh).sum().sqrt()
            expected = expected / (expected * expected).sum().sqrt()
            torch.testing.assert_close(memory.vectors[row].double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert (memory.vectors[row] == before[row]).all()


def test_unit_norm_and_float32_whatever_comes_in():
    memory = bank()
    memory.update(torch.arange(20), (1e3 * torch.randn(20, 128)).bfloat16())
    assert memory.vectors.dtype == torch.float32
    torch.testing.assert_close(memory.vectors.norm(dim=1), torch.ones(50))


def test_its_state_is_the_vectors():
    memory = bank()
    other = MemoryBank(torch.randn(50, 128), 40, 0.5)
    other.load_state_dict(memory.state_dict())
    assert list(memory.state_dict()) == ["vectors"]
    assert other.vectors.equal(memory.vectors)
    assert not list(memory.parameters())


def test_every_image_has_exactly_so_many_other_training_images():
    memory = bank()
    index = torch.arange(0, 50, 3)  # training and validation images
    for step in range(20):
        vectors, hidden = memory.draw_negatives(index, 12, rh.generator("cpu", step))
        rows = [(memory.vectors == v).all(1).nonzero().item() for v in vectors]
        assert len(set(rows)) == 13
        assert max(rows) < 40, "a validation image is never a negative"
        assert (hidden.sum(1) == 1).all()
        for image, mask in zip(index.tolist(), hidden, strict=True):
            visible = [row for row, away in zip(rows, mask.tolist(), strict=True) if not away]
            assert image not in visible
            assert len(visible) == 12


def test_all_others_when_as_many_are_asked_for():
    memory = bank()
    vectors, hidden = memory.draw_negatives(torch.tensor([5]), 39, rh.generator("cpu", 0))
    seen = {(memory.vectors == v).all(1).nonzero().item() for v, h in zip(vectors, hidden[0], strict=True) if not h}
    assert seen == set(range(40)) - {5}


def test_negatives_are_uniform():
    memory = bank()
    counts = torch.zeros(40)
    steps = 4000
    for step in range(steps):
        rows = torch.randperm(40, generator=rh.generator("cpu", step))[:11]  # what the bank draws
        vectors, hidden = memory.draw_negatives(torch.tensor([0]), 10, rh.generator("cpu", step))
        assert (vectors == memory.vectors[rows]).all()
        counts[rows[~hidden[0]]] += 1
    assert counts[0] == 0
    expected = steps * 10 / 39
    chi_square = ((counts[1:] - expected) ** 2 / expected).sum().item()
    assert chi_square < 70  # 38 degrees of freedom: 1 in 1,000
