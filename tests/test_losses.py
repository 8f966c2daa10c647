"""The losses against plain float64 loops, written from the paper's equations."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from plain_reference import LOSSES as LOOPS

from losses import modified_nce, nce, pirl_loss, pretext_correct


# ---- Vectors and settings ------------------------------------------------------------
def unit(*shape, seed=0):
    """Random unit vectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return F.normalize(vectors, dim=-1)


def settings(loss, positive="bank", loss_weight=0.5, temp_parameter=0.07):
    return SimpleNamespace(
        loss=loss,
        positive=positive,
        loss_weight=loss_weight,
        temp_parameter=temp_parameter,
    )


# ---- The loss ------------------------------------------------------------------------
@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("loss", ["modified-nce", "nce"])
@pytest.mark.parametrize("positive", ["bank", "pair"])
@pytest.mark.parametrize(
    ("weight", "batch_negatives"), [(0.5, False), (0.2, False), (0.2, True)]
)
def test_loss_and_gradients_against_loops(loss, positive, weight, batch_negatives, tau):
    batch = 3
    count = 7
    size = 16
    f = torch.randn(batch, size, dtype=torch.float64, requires_grad=True)
    g = torch.randn(batch, size, dtype=torch.float64, requires_grad=True)
    memory = unit(batch, size, seed=1)
    negatives = unit(count, size, seed=2)
    mask = torch.zeros(batch, count, dtype=torch.bool)
    mask[[0, 1, 2], [3, 6, 0]] = True

    slow = []
    for i in range(batch):
        others = [m for k, m in enumerate(negatives) if not mask[i, k]]
        if batch_negatives:
            others += [f[j] for j in range(batch) if j != i]
        partner = memory[i] if positive == "bank" else f[i]
        jigsaw_term = LOOPS[loss](partner, g[i], others, tau)
        image_term = LOOPS[loss](memory[i], f[i], others, tau)
        slow.append(weight * jigsaw_term + (1 - weight) * image_term)
    slow = torch.stack(slow)
    expected_gradients = torch.autograd.grad(slow.sum(), (f, g))

    f32 = f.detach().float().requires_grad_()
    g32 = g.detach().float().requires_grad_()
    all_negatives = negatives.float()
    if batch_negatives:
        # As training joins them: gradients flow into the batch's vectors.
        all_negatives = torch.cat([all_negatives, F.normalize(f32, dim=1)])
        mask = torch.cat([mask, torch.eye(batch, dtype=torch.bool)], dim=1)
    args = settings(loss, positive, weight, tau)
    fast = pirl_loss(f32, g32, memory.float(), all_negatives, mask, args)
    gradients = torch.autograd.grad(fast.sum(), (f32, g32))

    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["modified-nce", "nce"])
@pytest.mark.parametrize("tau", [0.01, 0.07])
def test_no_overflow_and_finite_gradients_at_the_extremes(loss, tau):
    """Positive and one negative at cosine ±1: the values are known in closed form."""
    w = unit(1, 128, seed=9).float()
    second_masked = torch.tensor([[False, True]])
    args = settings(loss, temp_parameter=tau)
    for positive in (1.0, -1.0):
        for negative in (1.0, -1.0):
            f = w.clone().requires_grad_()
            g = w.clone().requires_grad_()
            negatives = negative * w.repeat(2, 1)
            value = pirl_loss(f, g, positive * w, negatives, second_masked, args)
            gradients = torch.autograd.grad(value.sum(), (f, g))
            assert value.isfinite().all()
            assert all(gradient.isfinite().all() for gradient in gradients)

            # With one negative, −log h = softplus((n − p)/τ), and −log(1 − h(w, m)) is
            # the same number. Both terms of the loss are alike.
            gap = min((negative - positive) / tau, 700)
            expected = math.log1p(math.exp(gap))
            if loss == "nce":
                expected = 2 * expected
            # Cosines are float32, and each processor adds them up in its own order.
            rounding = 5e-7 / tau
            assert value.item() == pytest.approx(expected, rel=1e-5, abs=rounding)


@pytest.mark.parametrize("largest", range(4))
def test_logits_that_are_far_apart(largest):
    """Whichever column is the largest, by far: the value is exact, no gradient NaN."""
    row = [0.0, 1.0, 2.0, 3.0]
    row[largest] = 80.0
    odds = [math.exp(logit) for logit in row]
    log_h = row[0] - math.log(sum(odds))
    expected_nce = -log_h
    for k in (1, 2, 3):
        others = [odd for column, odd in enumerate(odds) if column != k]
        expected_nce -= math.log(sum(others)) - math.log(sum(odds))

    for loss, expected in ((modified_nce, -log_h), (nce, expected_nce)):
        logits = torch.tensor([row], requires_grad=True)
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert gradient.isfinite().all()


# ---- The pretext accuracy ------------------------------------------------------------
@pytest.mark.parametrize(
    ("lead", "is_correct"), [(3e-5, True), (3e-6, False), (0, False)]
)
def test_a_lead_must_be_more_than_rounding(lead, is_correct):
    """A tie is not correct: vectors that have collapsed must not read as 100 %."""

    def with_cosine(cosine):
        vector = torch.zeros(128)
        vector[0] = cosine
        vector[1] = math.sqrt(1 - cosine**2)
        return vector

    g = 30 * with_cosine(1).repeat(16, 1)
    memory = with_cosine(0.6).repeat(16, 1)
    negatives = with_cosine(0.6 - lead)[None]
    mask = torch.zeros(16, 1, dtype=torch.bool)
    correct = pretext_correct(g, memory, negatives, mask)
    assert correct.tolist() == [is_correct] * 16


def test_correct_is_of_the_cosine_of_g_with_its_own_row():
    """g comes as the network gives it: neither normalised nor, on GPUs, in float32.

    Of every second image the nearest negative is masked, as its own row would be.
    """
    memory = unit(40, 128, seed=1).float()
    negatives = unit(20, 128, seed=2).float()
    g = memory + 3 * unit(40, 128, seed=3).float()
    own = (memory * F.normalize(g, dim=1)).sum(1)
    similarity = F.normalize(g, dim=1) @ negatives.T
    mask = torch.zeros(40, 20, dtype=torch.bool)
    mask[range(0, 40, 2), similarity[::2].argmax(1)] = True

    expected = own > similarity.masked_fill(mask, -1).amax(1)
    assert not expected.equal(own > similarity.amax(1))
    assert 0 < expected.sum() < 40
    assert pretext_correct(g, memory, negatives, mask).equal(expected)
    assert pretext_correct(100 * g, memory, negatives, mask).equal(expected)
    rounded = pretext_correct(g.bfloat16(), memory, negatives, mask)
    assert (rounded != expected).sum() <= 1
