"""Training computed a second time, slowly and plainly, for tests to compare with.

float64, loops over images and negatives, the optimiser written out from the paper's
equations. Only the views and the order of random numbers are the project's.
"""

import copy
import math

import torch
from torch import nn

from augmentations import PIXEL_MEAN, PIXEL_STD
from runtime.randomness import NEGATIVES, make_generator


# ---- States --------------------------------------------------------------------------
def make_precise(trainer, *views):
    """Let a trainer's network compute in float64; its loss and its bank stay float32.

    In float32, a ReLU of almost 0 may let a gradient pass that is stopped in float64,
    and a wrong step could not be told from such a difference.
    """
    trainer.model.double()
    disturb_running_statistics(trainer.model.trunk)
    for state in trainer.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    for view in views:
        view.register_forward_hook(lambda module, inputs, output: output.double())


def disturb_running_statistics(trunk):
    """Let them be others than any batch's own, so that it matters which are used."""
    generator = torch.Generator().manual_seed(2)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            for buffer in (module.running_mean, module.running_var):
                noise = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(0.5 + noise)


def plain_copy(module):
    """A copy with torch's own convolutions, in float64."""
    module = copy.deepcopy(module).double()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = nn.Conv2d
    return module


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_change(before, after, slow_after):
    """Two state dicts have come from `before` to the same place.

    They are compared by how far each tensor has gone, not by where it is: a step is
    short, and a wrong one would not be far from the right one either.
    """
    for name in before:
        start = before[name].double()
        change = after[name].double() - start
        slow_change = slow_after[name].double() - start
        error = (change - slow_change).norm()
        assert slow_change.norm() > 0, name
        assert error <= 1e-4 * slow_change.norm(), (name, error, slow_change.norm())


class MomentumSGD:
    """v ← 0.9·v + gradient + decay·w;  w ← w − lr·v."""

    def __init__(self, parameters, weight_decay):
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.velocities = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients, lr):
        for number, gradient in enumerate(gradients):
            weight = self.parameters[number]
            gradient = gradient + self.weight_decay * weight
            self.velocities[number] = 0.9 * self.velocities[number] + gradient
            weight -= lr * self.velocities[number]


# ---- The paper's equations -----------------------------------------------------------
def cosine(a, b):
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def probabilities(u, w, negatives, tau):
    """h(u, w), and a list of the h(w, m_k) (equation 3)."""
    positive = (cosine(u, w) / tau).exp()
    rivals = [(cosine(w, m) / tau).exp() for m in negatives]
    total = positive + sum(rivals)
    return positive / total, [rival / total for rival in rivals]


def slow_modified_nce(u, w, negatives, tau):
    h, _ = probabilities(u, w, negatives, tau)
    return -h.log()


def slow_nce(u, w, negatives, tau):
    """Equation 4."""
    h, h_of_negatives = probabilities(u, w, negatives, tau)
    loss = -h.log()
    for h_of_negative in h_of_negatives:
        loss = loss - (1 - h_of_negative).log()
    return loss


LOSSES = {"modified-nce": slow_modified_nce, "nce": slow_nce}


class SlowPIRL:
    """The paper's training, on a copy of a trainer's network and bank."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.args = trainer.args
        self.train_count = trainer.train_count
        self.trunk = plain_copy(trainer.model.trunk)
        self.head_f = plain_copy(trainer.model.head_f)
        self.head_g = plain_copy(trainer.model.head_g)
        self.model = nn.ModuleDict(
            {"trunk": self.trunk, "head_f": self.head_f, "head_g": self.head_g}
        )
        self.bank = trainer.bank.vectors.double().clone()
        self.sgd = MomentumSGD(self.model.parameters(), self.args.weight_decay)
        self.gradient_norm = None

    def embeddings(self, index, uniforms, training):
        """f(φ(I)) and g(φ(I_t)), each [B, 128].

        The running statistics are those of whole images: the patches, normalised by
        their own batch's, see and leave a copy.
        """
        images = self.trainer.images[index].float()
        view = self.trainer.image_view(images, uniforms[index, :11])
        inputs = self.trainer.pretext(images, uniforms[index, 11:])

        self.trunk.train(training)
        f = self.head_f(self.trunk(view))

        self.trunk.train()
        names_and_buffers = self.trunk.named_buffers()
        buffers = {name: buffer.clone() for name, buffer in names_and_buffers}
        features = torch.func.functional_call(self.trunk, buffers, (inputs,))
        if self.args.pretext == "rotation":
            return f, self.head_g[-1](features)

        rows = []
        for patches in features.split(9):
            in_order = [self.head_g.patch(patch) for patch in patches]
            rows.append(self.head_g.together(torch.cat(in_order)))
        return f, torch.stack(rows)

    def negatives_of(self, image, epoch, step):
        """K bank rows of other training images.

        One draw of K + 1 serves the batch: whose own row is not in it leaves the last.
        """
        generator = make_generator("cpu", self.args.seed, NEGATIVES, epoch, step)
        rows = torch.randperm(self.train_count, generator=generator).tolist()
        rows = rows[: self.args.count_negatives + 1]
        rows.remove(image if image in rows else rows[-1])
        return [self.bank[row] for row in rows]

    def losses(self, index, places, f, g, all_f, epoch, step):
        """Each image's loss (equation 5), and whether its m_I is nearest to g.

        places: of these images in the batch `index`, of which all_f are the vectors.
        """
        args = self.args
        tau = args.temp_parameter
        losses = []
        correct = []
        for i, place in enumerate(places):
            image = index[place].item()
            memory = self.bank[image]
            negatives = self.negatives_of(image, epoch, step)
            most_similar = max(cosine(m, g[i]) for m in negatives)
            correct.append(bool(cosine(memory, g[i]) > most_similar))

            if args.batch_negatives:
                negatives += [all_f[j] for j in range(len(all_f)) if j != place]
            partner = f[i] if args.positive == "pair" else memory
            pretext_term = LOSSES[args.loss](partner, g[i], negatives, tau)
            image_term = LOSSES[args.loss](memory, f[i], negatives, tau)
            weight = args.loss_weight
            losses.append(weight * pretext_term + (1 - weight) * image_term)
        return torch.stack(losses), correct

    def learning_rate(self, epoch, step):
        """A linear warm-up times half a cosine over --tmax-for-cos-decay epochs."""
        steps_per_epoch = math.ceil(self.train_count / self.args.batch_size)
        steps_done = (epoch - 1) * steps_per_epoch + step
        warm_up = min(1, (steps_done + 1) / self.args.warmup_steps)
        steps_of_cosine = self.args.tmax_for_cos_decay * steps_per_epoch
        cosine_decay = 0.5 * (1 + math.cos(math.pi * steps_done / steps_of_cosine))
        return self.args.lr * warm_up * cosine_decay

    def update_bank(self, index, all_f):
        beta = self.args.beta
        for i, image in enumerate(index.tolist()):
            fresh = all_f[i].detach() / all_f[i].detach().norm()
            mixed = beta * self.bank[image] + (1 - beta) * fresh
            self.bank[image] = mixed / mixed.norm()

    def train_step(self, index, uniforms, epoch, step, places=None, others=None):
        """[sum of the losses, number of correct answers].

        places: of one rank's images in the batch; others: the vectors of the whole
        batch, of which those of other ranks are used. The ranks' gradients are
        averaged, so each has its part of the batch's mean loss times their number, 2.
        """
        whole = places is None
        places = range(len(index)) if whole else places
        f, g = self.embeddings(index[list(places)], uniforms, training=True)
        all_f = f
        if not whole:
            rows = list(others.double())
            for i, place in enumerate(places):
                rows[place] = f[i]
            all_f = torch.stack(rows)
        losses, correct = self.losses(index, places, f, g, all_f, epoch, step)

        loss = losses.sum() / len(index) * (1 if whole else 2)
        gradients = torch.autograd.grad(loss, self.sgd.parameters)
        squares = [(gradient * gradient).sum() for gradient in gradients]
        self.gradient_norm = torch.stack(squares).sum().sqrt().item()
        shorten = min(1, 2 / self.gradient_norm)
        gradients = [shorten * gradient for gradient in gradients]
        self.sgd.step(gradients, self.learning_rate(epoch, step))

        self.update_bank(index, all_f)
        return [losses.sum().item(), sum(correct)]

    @torch.no_grad()
    def validate(self, uniforms, epoch):
        """(mean loss, accuracy) of the images behind the training images."""
        steps_per_epoch = math.ceil(self.train_count / self.args.batch_size)
        last = len(self.trainer.images)
        loss_sum = 0
        correct_sum = 0
        batches = torch.arange(self.train_count, last).split(self.args.batch_size)
        for number, index in enumerate(batches):
            f, g = self.embeddings(index, uniforms, training=False)
            step = steps_per_epoch + number
            places = range(len(index))
            losses, correct = self.losses(index, places, f, g, f, epoch, step)
            loss_sum += losses.sum().item()
            correct_sum += sum(correct)
            self.update_bank(index, f)
        count = last - self.train_count
        return loss_sum / count, correct_sum / count


# ---- Plain images and their statistics -----------------------------------------------
def plain(images):
    """uint8 images as evaluation feeds them to a network."""
    mean = torch.tensor(PIXEL_MEAN)[:, None, None]
    std = torch.tensor(PIXEL_STD)[:, None, None]
    return (images / 255 - mean) / std


def slow_statistics(trunk, batches):
    """{name of a batch norm: (mean, variance)}, averaged over batches of images."""
    trunk = plain_copy(trunk).train()
    seen = {}

    def note_input(name):
        def hook(module, inputs):
            values = inputs[0].transpose(0, 1).flatten(1)  # [channels, B·H·W]
            seen.setdefault(name, []).append((values.mean(1), values.var(1)))

        return hook

    for name, module in trunk.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(note_input(name))
    with torch.no_grad():
        for batch in batches:
            trunk(plain(batch).double())

    statistics = {}
    for name, values in seen.items():
        means, variances = zip(*values, strict=True)
        statistics[name] = (torch.stack(means).mean(0), torch.stack(variances).mean(0))
    return statistics


def assert_statistics(state_dict, statistics):
    for name, (mean, variance) in statistics.items():
        measured_mean = state_dict[f"{name}.running_mean"].double()
        measured_variance = state_dict[f"{name}.running_var"].double()
        torch.testing.assert_close(measured_mean, mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(measured_variance, variance, rtol=1e-3, atol=1e-4)


# ---- Calls ---------------------------------------------------------------------------
def note_calls(monkeypatch, owner, name, note):
    """note(its arguments, its result) whenever owner.name has been called."""
    function = getattr(owner, name)

    def noting(*arguments, **options):
        result = function(*arguments, **options)
        note(arguments, result)
        return result

    monkeypatch.setattr(owner, name, noting)
