"""The memory bank M of past image vectors: the positives' partners and the pool of negatives (paper, section 3.3)."""

import torch
import torch.nn.functional as F
from torch import nn


class MemoryBank(nn.Module):
    """One unit vector m_i per image, float32 [N, 128], on the training device; no gradient flows into it.

    The rows of the training images come first; only they are ever negatives. The rows of validation images behind
    them are kept by the same rule, so that the validation loss is made as the training loss is.
    """

    def __init__(self, vectors, train_count, beta):
        """vectors [N, 128], normalised here; train_count: how many of the first rows train; beta: β, of the past."""
        super().__init__()
        self.register_buffer("vectors", F.normalize(vectors.float(), dim=1))
        self.train_count, self.beta = train_count, beta

    @torch.no_grad()
    def update(self, index, image_vectors):
        """m_i ← β·m_i + (1−β)·f(φ(I))/‖f(φ(I))‖, normalised again.

        index [B] int64, no row twice; image_vectors f(φ(I)) [B, 128], any float type.
        """
        fresh = F.normalize(image_vectors.float(), dim=1)
        mixed = self.beta * self.vectors[index] + (1 - self.beta) * fresh
        self.vectors.index_copy_(0, index, F.normalize(mixed, dim=1))

    def draw_negatives(self, index, count, generator):
        """`count` negatives for each image of the batch, uniform over the other training images, none of them twice.

        One draw of count + 1 rows serves the whole batch. An image whose own row was drawn does not see that row; any
        other image does not see the last row: each has exactly `count` negatives.

        index [B] int64; returns (vectors [count + 1, 128], hidden [B, count + 1] bool: True where not a negative).
        """
        rows = torch.randperm(self.train_count, generator=generator, device=self.vectors.device)[: count + 1]
        hidden = rows == index[:, None]
        hidden[:, -1] |= ~hidden.any(1)
        return self.vectors[rows], hidden
