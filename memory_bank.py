"""The memory bank M of past image vectors (paper, section 2.2)."""

import torch
import torch.nn.functional as F
from torch import nn


class MemoryBank(nn.Module):
    """One unit vector m_i per image, float32 [N, 128]; no gradient flows into it.

    m_i is what the two views of image i have to find; the others are the pool of
    negatives. The rows of the training images come first, and only they are ever
    negatives. The rows of validation images after them are updated by the same rule, so
    that the validation loss is computed as the training loss is.
    """

    def __init__(self, vectors, train_count, beta):
        """vectors [N, 128], normalised here. train_count: how many of the first rows
        are of training images. beta: β, the weight of the past.
        """
        super().__init__()
        self.register_buffer("vectors", F.normalize(vectors.float(), dim=1))
        self.train_count = train_count
        self.beta = beta

    @torch.no_grad()
    def update(self, index, image_vectors):
        """m_i ← β·m_i + (1−β)·f(φ(I))/‖f(φ(I))‖, normalised again.

        index [B] int64, no row twice; image_vectors f(φ(I)) [B, 128], any float type.
        """
        f = F.normalize(image_vectors.float(), dim=1)
        mixed = self.beta * self.vectors[index] + (1 - self.beta) * f
        self.vectors.index_copy_(0, index, F.normalize(mixed, dim=1))

    def draw_negatives(self, index, count, generator):
        """`count` negatives for each image of a batch, none of them twice.

        They are uniform over the other training images. One draw of count + 1 rows
        serves the whole batch: an image whose own row was drawn does not see that row,
        and any other image does not see the last row, so each has exactly `count`
        negatives. (The paper draws for each image. For 128 images with 6,400 negatives,
        420 MB of vectors would be copied in each step.)

        index [B] int64. Returns (vectors [count + 1, 128],
        excluded [B, count + 1] bool: True where a vector is no negative of that image).
        """
        order = torch.randperm(
            self.train_count, generator=generator, device=self.vectors.device
        )
        rows = order[: count + 1]
        excluded = rows == index[:, None]  # [B, count + 1]
        own_row_drawn = excluded.any(1)
        excluded[:, -1] |= ~own_row_drawn
        return self.vectors[rows], excluded
