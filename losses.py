"""PIRL's loss (paper, sections 2.1 and 2.2, equations 3 to 5)."""

import math

import torch
import torch.nn.functional as F


def pirl_loss(image_embeddings, pretext_embeddings, memory, negatives, mask, args):
    """L = λ · loss(m_I, g(φ(I_t))) + (1 − λ) · loss(m_I, f(φ(I))) (equation 5).

    With --positive pair, f(φ(I)) stands for m_I in the first term.
    image_embeddings and pretext_embeddings [B, 128]: what the heads f and g give.
    memory [B, 128]: the images' own rows of the bank. negatives [C, 128]: unit vectors.
    mask [B, C] bool: True where one of these must not count for that image. args:
    temp_parameter (τ), loss_weight (λ), loss and positive. Returns the loss of each
    image, float32 [B].
    """
    f = F.normalize(image_embeddings.float(), dim=1)  # f(φ(I)),   [B, 128]
    g = F.normalize(pretext_embeddings.float(), dim=1)  # g(φ(I_t)), [B, 128]

    # Each image asks two queries, and both have to find m_I among the negatives. With
    # --positive pair, g has to find f instead, and the gradient flows into both.
    # Stacked, all queries take one product with the negatives and one backward pass.
    g_target = f if args.positive == "pair" else memory
    queries = torch.cat([g, f])  # [2·B, 128]
    targets = torch.cat([g_target, memory])  # [2·B, 128]

    # Cosine similarities, divided by τ: the target's first, then the negatives'.
    positive_logits = (targets * queries).sum(1, keepdim=True)  # [2·B, 1]
    negative_logits = queries @ negatives.T  # [2·B, C]
    negative_logits = negative_logits.masked_fill(torch.cat([mask, mask]), -math.inf)
    logits = torch.cat([positive_logits, negative_logits], dim=1) / args.temp_parameter

    criterion = LOSSES[args.loss]
    pretext_term, image_term = criterion(logits).chunk(2)  # in the order of queries
    return args.loss_weight * pretext_term + (1 - args.loss_weight) * image_term


def modified_nce(logits):
    """−log h (equation 3), the default: the first term of nce(), known as InfoNCE.

    h is the softmax probability of the positive. logits [B, 1 + C]: the positive's
    first, then the negatives' -> [B].
    """
    return -F.log_softmax(logits, dim=1)[:, 0]


def nce(logits):
    """−log h(u, w) − Σ_k log(1 − h(w, m_k)) (equation 4), the paper's loss.

    h(u, w) is the softmax probability of column 0, the positive; h(w, m_k) that of the
    negative m_k's column. logits [B, 1 + C] -> [B].

    Simply written, this is −log_h[:, 0] − log(1 − exp(log_h[:, 1:])).sum(1). But 1 − h
    loses its digits where h is nearly 1. In each row, only the largest h can be above
    1/2, so log(1 − h) of that column is computed from the other columns instead.
    """
    log_h = F.log_softmax(logits, dim=1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_top = columns == logits.argmax(1, keepdim=True)  # [B, 1 + C], one True in a row

    # log(1 − h) of the largest column: its 1 − h is the sum of all other h.
    log_others = logits.masked_fill(is_top, -math.inf).logsumexp(1, keepdim=True)
    log_1_minus_top = log_others - logits.logsumexp(1, keepdim=True)  # [B, 1]

    # log(1 − h) of every other column, whose h is 1/2 at most. The largest h is set to
    # 0 here: its log1p(−1) = −∞ would make the gradient NaN.
    h = log_h.masked_fill(is_top, -math.inf).exp()
    log_1_minus_h = torch.where(is_top, log_1_minus_top, torch.log1p(-h))
    # Column 0 is the positive, which has no such term.
    return -log_h[:, 0] - log_1_minus_h[:, 1:].sum(1)


# By the names of --loss.
LOSSES = {"modified-nce": modified_nce, "nce": nce}


@torch.no_grad()
def pretext_correct(pretext_embeddings, memory, negatives, mask):
    """Whether m_I is more similar to g(φ(I_t)) than every negative from the bank is.

    The share of such images is the pretext accuracy. A tie does not count, or
    embeddings that have collapsed into one would have 100 %. Shapes as in pirl_loss();
    bool [B].
    """
    g = F.normalize(pretext_embeddings.float(), dim=1)
    similarity = (memory * g).sum(1)
    negative_similarities = (g @ negatives.T).masked_fill(mask, -math.inf)
    return similarity > negative_similarities.amax(1) + 1e-5  # above rounding, 1e-7
