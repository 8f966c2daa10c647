"""The losses against plain float64 loops, written from the paper's equations."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pirl_stl_train_test import candidate_logits, modified_nce, nce, parse_args, pirl_loss


def unit(*shape, seed=0):
    vectors = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors, dim=-1)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a).sqrt() * sum(y * y for y in b).sqrt())


def loop_h(numerator, u, w, negatives, tau):
    """Equation 4: exp(numerator/τ) / (exp(s(u, w)/τ) + Σ_k exp(s(w, m_k)/τ))."""
    total = (cosine(u, w) / tau).exp()
    for m in negatives:
        total = total + (cosine(w, m) / tau).exp()
    return (numerator / tau).exp() / total


def loop_modified_nce(u, w, negatives, tau):
    return -loop_h(cosine(u, w), u, w, negatives, tau).log()


def loop_nce(u, w, negatives, tau):
    loss = -loop_h(cosine(u, w), u, w, negatives, tau).log()
    for m in negatives:
        loss = loss - (1 - loop_h(cosine(w, m), u, w, negatives, tau)).log()
    return loss


LOOPS = {"modified-nce": loop_modified_nce, "nce": loop_nce}


def settings(loss="modified-nce", positive="bank", loss_weight=0.5, temp_parameter=0.07):
    return SimpleNamespace(loss=loss, positive=positive, loss_weight=loss_weight, temp_parameter=temp_parameter)


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("loss", ["modified-nce", "nce"])
@pytest.mark.parametrize("positive", ["bank", "pair"])
@pytest.mark.parametrize(("weight", "fresh"), [(0.5, False), (0.2, False), (0.2, True)])
def test_loss_and_gradients_against_loops(loss, positive, weight, fresh, tau):
    batch, count, size = 3, 7, 16
    f = torch.randn(batch, size, dtype=torch.float64, requires_grad=True)
    g = torch.randn(batch, size, dtype=torch.float64, requires_grad=True)
    memory, negatives = unit(batch, size, seed=1), unit(count, size, seed=2)
    hidden = torch.zeros(batch, count, dtype=torch.bool)
    hidden[0, 3] = hidden[1, 6] = hidden[2, 0] = True

    slow = []
    for i in range(batch):
        others = [m for k, m in enumerate(negatives) if not hidden[i, k]]
        others += [f[j] for j in range(batch) if j != i] if fresh else []
        partner = memory[i] if positive == "bank" else f[i]
        term_g, term_f = LOOPS[loss](partner, g[i], others, tau), LOOPS[loss](memory[i], f[i], others, tau)
        slow.append(weight * term_g + (1 - weight) * term_f)
    slow = torch.stack(slow)
    expected = torch.autograd.grad(slow.sum(), (f, g))

    f32, g32 = (x.detach().float().requires_grad_() for x in (f, g))
    args = settings(loss, positive, weight, tau)
    fresh = (f32, torch.eye(batch, dtype=torch.bool)) if fresh else None
    fast, _ = pirl_loss(f32, g32, memory.float(), negatives.float(), hidden, args, fresh)
    gradients = torch.autograd.grad(fast.sum(), (f32, g32))
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


def test_negatives_are_compared_with_the_second_vector():
    """h(u, w) is not symmetric: Σ_k is over s(w, m_k)."""
    u, w, negatives = unit(1, 128, seed=3), unit(1, 128, seed=4), unit(5, 128, seed=5)
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    one, other = (modified_nce(candidate_logits(a, b, negatives, hidden, 0.07)) for a, b in ((u, w), (w, u)))
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("loss", [modified_nce, nce])
def test_a_hidden_column_is_as_if_it_were_not_there(loss):
    u, w, negatives = unit(2, 128, seed=6), unit(2, 128, seed=7), unit(9, 128, seed=8)
    negatives[4] = w[0]  # the image's own entry would be by far the most similar
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[:, 4] = True
    without = torch.cat([negatives[:4], negatives[5:]])
    a = loss(candidate_logits(u, w, negatives, hidden, 0.07))
    b = loss(candidate_logits(u, w, without, torch.zeros(2, 8, dtype=torch.bool), 0.07))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [modified_nce, nce])
@pytest.mark.parametrize("tau", [0.01, 0.07])
def test_no_overflow_and_finite_gradients_at_the_extremes(loss, tau):
    """Positive and one negative at cosine ±1: the exact values are known in closed form."""
    w = unit(1, 128, seed=9).float()
    for positive, negative in ((1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (-1.0, -1.0)):
        v = w.clone().requires_grad_()
        logits = candidate_logits(positive * w, v, negative * w.repeat(2, 1), torch.tensor([[False, True]]), tau)
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value.sum(), v)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        # with one negative, −log h = softplus((n − p)/τ) and −log(1 − h(w, m)) is the same number
        expected = math.log1p(math.exp(min((negative - positive) / tau, 700)))
        rounding = 5e-7 / tau  # cosines are float32, and each processor adds them up in an order of its own
        assert value.item() == pytest.approx(expected * (2 if loss is nce else 1), rel=1e-5, abs=rounding)


def test_chance_level_is_log_of_the_candidates():
    """All similarities equal: −log h is log(K + 1)."""
    vector = unit(1, 128).float()
    same = vector.repeat(10, 1)
    loss, hits = pirl_loss(vector, vector, vector, same, torch.zeros(1, 10, dtype=torch.bool), settings())
    assert loss.item() == pytest.approx(math.log(11), rel=1e-5)
    assert not hits.item()  # a tie is no hit: collapsed vectors must not read as 100 %


@pytest.mark.parametrize("positive", ["bank", "pair"])
def test_hits_are_of_g_against_the_bank(positive):
    memory, negatives = unit(2, 128, seed=1).float(), unit(6, 128, seed=2).float()
    g = torch.stack([memory[0] + 0.1 * negatives[0], negatives[3] + 0.1 * memory[1]])
    f = torch.flip(g, (0,))  # of no account
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    assert pirl_loss(f, g, memory, negatives, hidden, settings(positive=positive))[1].tolist() == [True, False]
    hidden[1, 3] = True  # the rival is the image's own entry
    negatives[[0, 1, 2, 4, 5]] = -memory[1]
    assert pirl_loss(f, g, memory, negatives, hidden, settings(positive=positive))[1].tolist()[1]


@pytest.mark.parametrize("loss", ["modified-nce", "nce"])
def test_the_default_loss_cannot_be_solved_by_age(loss):
    """All current vectors alike but for one shift against all stale ones: the loss is that of chance or above.

    With --positive pair alone, the same vectors, which tell no image from another, solve the jigsaw term.
    """
    old, new = unit(2, 128, seed=11).float()
    memory, negatives, fresh = old.repeat(4, 1), old.repeat(50, 1), new.repeat(4, 1)
    hidden = torch.zeros(4, 50, dtype=torch.bool)
    chance, _ = pirl_loss(memory, memory, memory, negatives, hidden, settings(loss))

    def jigsaw_term(positive, batch_negatives=False):
        args = settings(loss, positive, loss_weight=1.0)
        batch = (fresh, torch.eye(4, dtype=torch.bool)) if batch_negatives else None
        return pirl_loss(fresh, fresh, memory, negatives, hidden, args, batch)[0]

    defaults = parse_args([])
    by_default = jigsaw_term(defaults.positive, defaults.batch_negatives)
    assert (by_default > 1.0).all(), "no image can be told from the others, so the loss must not be near 0"
    torch.testing.assert_close(jigsaw_term(positive="bank"), chance, rtol=1e-4, atol=1e-4)
    assert (jigsaw_term(positive="pair") < 0.01).all()
    if loss == "modified-nce":
        alike = jigsaw_term(positive="pair", batch_negatives=True)  # the batch alone is left to tell apart
        torch.testing.assert_close(alike, torch.full((4,), math.log(4)), rtol=1e-4, atol=0)
