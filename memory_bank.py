"""The memory bank M of past image embeddings (paper, section 2.2)."""

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

    def draw(self, count, generator):
        """The rows of a batch's negatives, int64 [count + 1], none of them twice.

        They are uniform over the training images. There is one more than an image has
        negatives, since each image leaves one out: see negatives().
        """
        order = torch.randperm(
            self.train_count, generator=generator, device=self.vectors.device
        )
        return order[: count + 1]

    def negatives(self, drawn, index):
        """The drawn rows [K + 1] as negatives of the images `index` [B], K for each.

        One draw serves the whole batch. Each image leaves one row out: its own if that
        was drawn, else the last. So each image has exactly K, uniform over the other
        training images. (The paper draws for each image. For 128 images with 6,400
        negatives, 420 MB of vectors would be copied in each step.)

        Returns (vectors [K + 1, 128], mask [B, K + 1] bool: True for the one that must
        not count for that image).
        """
        mask = drawn == index[:, None]  # [B, K + 1]
        own_row_drawn = mask.any(1)
        mask[:, -1] |= ~own_row_drawn  # images whose row was not drawn drop the last
        return self.vectors[drawn], mask

    @torch.no_grad()
    def update(self, index, image_embeddings):
        """m_i ← β·m_i + (1−β)·f(φ(I))/‖f(φ(I))‖, normalised again.

        index [B] int64, no row twice; image_embeddings f(φ(I)) [B, 128], any float
        type.
        """
        f = F.normalize(image_embeddings.float(), dim=1)
        mixed = self.beta * self.vectors[index] + (1 - self.beta) * f
        self.vectors.index_copy_(0, index, F.normalize(mixed, dim=1))
