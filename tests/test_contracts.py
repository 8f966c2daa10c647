"""What a step, a validation, an export and a whole run promise, computed a second time.

The reference here is slow and plain: float64, loops over images and negatives, the
optimiser written out. Only the views and the order of random numbers are the project's.
"""

import contextlib
import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ThinResNet
from records import checkpoint, weights
from torch import nn

import linear_probe
import models
import pirl_stl_train_test
import train_stl_after_ssl
from augmentations import PIXEL_MEAN, PIXEL_STD
from evaluation import knn_accuracy
from runtime.experiment import Experiment
from runtime.randomness import (
    BANK,
    INITIAL_WEIGHTS,
    NEGATIVES,
    ORDER,
    VIEWS,
    derived_seed,
    make_generator,
)
from runtime.weights import read_weights

CPU = torch.device("cpu")
SIDE = 36
TRAIN_IMAGES = 10
VALIDATION_IMAGES = 8

# Every number differs from its neighbours and from what leaving it out would mean; the
# weight decay is large, so that a step without it is another one.
# fmt: off
FLAGS = [
    "--device", "cpu", "--image-size", SIDE, "--batch-size", 6, "--epochs", 3,
    "--lr", 0.3, "--warmup-steps", 8, "--tmax-for-cos-decay", 5, "--weight-decay", 0.05,
    "--count-negatives", 3, "--beta", 0.3, "--loss-weight", 0.3, "--zero-init", "False",
]
# fmt: on


# ---- A trainer, and a plain network of float64 that begins alike ---------------------
def make_pretraining(*flags):
    """Pretraining on images of noise: the first ten train, eight validate."""
    parser = pirl_stl_train_test.make_parser()
    args = parser.parse_args([str(flag) for flag in (*FLAGS, *flags)])
    pirl_stl_train_test.resolve_defaults(args, CPU)

    generator = torch.Generator().manual_seed(1)
    size = (TRAIN_IMAGES + VALIDATION_IMAGES, 3, SIDE, SIDE)
    images = torch.randint(0, 256, size, generator=generator).byte()
    trainer = pirl_stl_train_test.PretrainingTrainer(args, CPU, images, TRAIN_IMAGES)
    make_precise(trainer, trainer.image_view, trainer.pretext)
    return trainer


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


# ---- PIRL, slowly --------------------------------------------------------------------
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


class SlowPIRL:
    """The paper's training, on a copy of a trainer's network and bank."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.args = trainer.args
        self.trunk = plain_copy(trainer.model.trunk)
        self.head_f = plain_copy(trainer.model.head_f)
        self.head_g = plain_copy(trainer.model.head_g)
        self.model = nn.ModuleDict(
            {"trunk": self.trunk, "head_f": self.head_f, "head_g": self.head_g}
        )
        self.bank = trainer.bank.vectors.double().clone()
        self.sgd = MomentumSGD(self.model.parameters(), self.args.weight_decay)
        self.gradient_norm = None

    def vectors(self, index, uniforms, training):
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
        rows = torch.randperm(TRAIN_IMAGES, generator=generator).tolist()
        rows = rows[: self.args.count_negatives + 1]
        rows.remove(image if image in rows else rows[-1])
        return [self.bank[row] for row in rows]

    def losses(self, index, f, g, all_f, epoch, step):
        """Each image's loss (equation 5), and whether its m_I is nearest to g.

        all_f: the vectors of the whole batch, whose first are f.
        """
        args = self.args
        tau = args.temp_parameter
        criterion = slow_nce if args.loss == "nce" else slow_modified_nce
        losses = []
        correct = []
        for i, image in enumerate(index.tolist()):
            memory = self.bank[image]
            negatives = self.negatives_of(image, epoch, step)
            most_similar = max(cosine(m, g[i]) for m in negatives)
            correct.append(bool(cosine(memory, g[i]) > most_similar))

            if args.batch_negatives:
                negatives += [all_f[j] for j in range(len(all_f)) if j != i]
            partner = f[i] if args.positive == "pair" else memory
            pretext_term = criterion(partner, g[i], negatives, tau)
            image_term = criterion(memory, f[i], negatives, tau)
            weight = args.loss_weight
            losses.append(weight * pretext_term + (1 - weight) * image_term)
        return torch.stack(losses), correct

    def learning_rate(self, epoch, step):
        """A linear warm-up times half a cosine over --tmax-for-cos-decay epochs."""
        steps_per_epoch = math.ceil(TRAIN_IMAGES / self.args.batch_size)
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

    def train_step(self, index, uniforms, epoch, step, other_ranks_f=None):
        """[sum of the losses, number of correct answers].

        other_ranks_f: the vectors of the batch's last images, where another rank has
        computed them; the losses and the gradient are then those of the first.
        """
        share = index
        if other_ranks_f is not None:
            share = index[: len(index) - len(other_ranks_f)]
        f, g = self.vectors(share, uniforms, training=True)
        all_f = f
        if other_ranks_f is not None:
            all_f = torch.cat([f, other_ranks_f.double()])
        losses, correct = self.losses(share, f, g, all_f, epoch, step)

        mean_loss = losses.sum() / len(share)
        gradients = torch.autograd.grad(mean_loss, self.sgd.parameters)
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
        steps_per_epoch = math.ceil(TRAIN_IMAGES / self.args.batch_size)
        last = TRAIN_IMAGES + VALIDATION_IMAGES
        loss_sum = 0
        correct_sum = 0
        batches = torch.arange(TRAIN_IMAGES, last).split(self.args.batch_size)
        for number, index in enumerate(batches):
            f, g = self.vectors(index, uniforms, training=False)
            step = steps_per_epoch + number
            losses, correct = self.losses(index, f, g, f, epoch, step)
            loss_sum += losses.sum().item()
            correct_sum += sum(correct)
            self.update_bank(index, f)
        return loss_sum / VALIDATION_IMAGES, correct_sum / VALIDATION_IMAGES


# ---- PretrainingTrainer ---------------------------------------------------------------------
ALL_LOSSES = []
for loss in ("modified-nce", "nce"):
    for positive in ("bank", "pair"):
        for batch_negatives in ("True", "False"):
            ALL_LOSSES.append(
                f"--loss {loss} --positive {positive}"
                f" --batch-negatives {batch_negatives}"
            )


@pytest.mark.parametrize(
    "flags",
    [
        *ALL_LOSSES,
        "--pretext rotation --seed 3",
        "--temp-parameter 5 --weight-decay 0.01 --seed 4",
    ],
)
def test_two_training_steps(flags):
    """The second epoch: a full batch, and the four images that are left."""
    trainer = make_pretraining(*flags.split())
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(2)
    order = torch.tensor([7, 2, 9, 4, 0, 5, 3, 8, 1, 6])

    for step, index in enumerate(order.split(6)):
        before = state_of(trainer.model)
        bank_before = trainer.bank.vectors.clone()
        trainer.model.eval()  # as validation leaves it
        totals = trainer.train_step(index, uniforms, 2, step)
        slow_totals = slow.train_step(index, uniforms, 2, step)

        assert totals.tolist() == pytest.approx(slow_totals, rel=1e-4)
        lr = trainer.optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(slow.learning_rate(2, step), rel=1e-9)
        assert_same_change(before, state_of(trainer.model), state_of(slow.model))

        bank = trainer.bank.vectors
        torch.testing.assert_close(bank.double(), slow.bank, rtol=0, atol=2e-5)
        changed = (bank != bank_before).any(1).nonzero().flatten()
        assert changed.tolist() == sorted(index.tolist())

        # The limit of the gradient's norm takes part, or, at a high τ, does not.
        assert (slow.gradient_norm > 2) == (trainer.args.temp_parameter < 1)


def test_a_rank_takes_its_share_of_the_whole_batch_s_step(monkeypatch):
    """Rank 0 of 2: its images' losses, the other rank's vectors as negatives.

    The gradient is that of its share's mean loss, for the ranks' gradients are
    averaged. At this temperature it is not clipped, which would hide a factor.
    """
    trainer = make_pretraining("--temp-parameter", 20)
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(1)
    index = torch.tensor([7, 2, 9, 4, 0, 5])
    before = state_of(trainer.model)
    others = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
    reduced = []

    def gather_rows(rows, counts):
        assert counts == [3, 3]
        return torch.cat([rows, others])

    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 2)
    monkeypatch.setattr(pirl_stl_train_test, "gather_rows", gather_rows)
    connection = SimpleNamespace(all_reduce=reduced.append)
    monkeypatch.setattr(pirl_stl_train_test, "distributed", connection)
    totals = trainer.train_step(index, uniforms, 1, 0)
    slow_totals = slow.train_step(index, uniforms, 1, 0, others)

    assert totals.tolist() == pytest.approx(slow_totals, rel=1e-4)
    assert reduced[0] is totals, "the totals are summed over the ranks"
    assert slow.gradient_norm < 1
    assert_same_change(before, state_of(trainer.model), state_of(slow.model))
    bank = trainer.bank.vectors.double()
    torch.testing.assert_close(bank, slow.bank, rtol=0, atol=2e-5)


def test_the_network_is_what_the_flags_say():
    trainer = make_pretraining(
        "--seed", 5, "--crop-area", 0.4, "--colour-strength", 0.3
    )
    trunk = trainer.model.trunk
    assert trunk.conv1.kernel_size == (7, 7)
    assert trunk.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert (trunk.layer1[0].bn2.weight == 1).all()
    assert len(trainer.model.head_f) == len(trainer.model.head_g.together) == 1
    assert trainer.image_view.area == (0.4, 1.0)
    assert trainer.image_view.colour_jitter.strength == 0.3
    assert trainer.pretext.colour_jitter.strength == 0.3
    assert trainer.negative_count == 3

    # The first weights have a stream of random numbers of their own.
    torch.manual_seed(derived_seed(5, INITIAL_WEIGHTS))
    first_trunk, _ = models.make_trunk("res18", zero_init=False)
    assert trunk.conv1.weight.equal(first_trunk.conv1.weight.double())

    # fmt: off
    others = make_pretraining(
        "--stem", "small", "--zero-init", "True", "--non-linear-head", "True",
    )
    # fmt: on
    trunk = others.model.trunk
    assert trunk.conv1.kernel_size == (3, 3)
    assert (trunk.layer1[0].bn2.weight == 0).all()
    assert len(others.model.head_f) == len(others.model.head_g.together) == 3


def test_the_trunk_is_that_of_model_type(monkeypatch):
    class OtherResNet(ThinResNet):
        pass

    monkeypatch.setitem(models.TRUNKS, "res50", OtherResNet)
    trainer = make_pretraining("--model-type", "res50")
    assert type(trainer.model.trunk) is OtherResNet


def test_by_default_all_other_training_images_are_negatives(monkeypatch):
    """If they are fewer than 6,400."""
    args = pirl_stl_train_test.make_parser().parse_args(["--device", "cpu"])
    pirl_stl_train_test.resolve_defaults(args, CPU)
    images = torch.zeros(18, 3, SIDE, SIDE, dtype=torch.uint8)
    trainer = pirl_stl_train_test.PretrainingTrainer(args, CPU, images, TRAIN_IMAGES)
    assert trainer.negative_count == TRAIN_IMAGES - 1
    monkeypatch.setattr(pirl_stl_train_test, "DEFAULT_NEGATIVES", 4)
    trainer = pirl_stl_train_test.PretrainingTrainer(args, CPU, images, TRAIN_IMAGES)
    assert trainer.negative_count == 4


def test_two_ranks_average_their_gradients_and_not_their_statistics(monkeypatch):
    """And with --compile, the trunk and the views are compiled for fixed shapes."""
    wrapped = []
    compiled = []

    def parallel(model, **options):
        wrapped.append((model, options))
        return "parallel"

    def compile_function(function, **options):
        compiled.append((function.__name__, options))
        return function

    def compile_module(module, **options):
        compiled.append((type(module).__name__, options))

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", parallel)
    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(nn.Module, "compile", compile_module)
    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 2)
    monkeypatch.setattr(pirl_stl_train_test, "check_compiler", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make_pretraining("--compile", "True")
        # Only this warning of DistributedDataParallel is left out.
        warnings.warn("Grad strides do not match bucket view strides.", stacklevel=1)
        with pytest.raises(UserWarning, match="another"):
            warnings.warn("another", stacklevel=1)
    assert trainer.network == "parallel"
    assert wrapped == [(trainer.model, {"broadcast_buffers": False})]
    fixed = {"dynamic": False}
    assert compiled == [("ThinResNet", fixed), ("make_views", fixed)]

    compiled.clear()
    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 1)
    alone = make_pretraining()
    assert alone.network is alone.model
    assert compiled == []


@pytest.mark.parametrize(("ranks", "has_share"), [(3, True), (4, False)])
def test_the_last_rank_of_a_batch_of_three_images(monkeypatch, ranks, has_share):
    """Of three ranks it has one image. Of four it has none, and a stand-in.

    The others wait for its gradients, so its loss is 0 and not left out.
    """
    trainer = make_pretraining()
    uniforms = trainer.epoch_uniforms(1)
    index = torch.tensor([7, 2, 9])
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0]))
    )

    def gather_rows(rows, counts):
        assert counts == [1, 1, 1, 0][:ranks]
        return torch.ones(3, 128)

    def all_correct(pretext_vectors, *others):
        return torch.ones(len(pretext_vectors), dtype=torch.bool)

    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", ranks)
    monkeypatch.setattr(pirl_stl_train_test, "RANK", ranks - 1)
    monkeypatch.setattr(pirl_stl_train_test, "gather_rows", gather_rows)
    monkeypatch.setattr(pirl_stl_train_test, "pretext_correct", all_correct)
    _, losses, correct = trainer.forward_batch(index, uniforms, 1, 0)

    assert seen == [1]
    assert losses.shape == correct.shape == (1,)
    assert (losses.item() > 0) == has_share
    assert losses.isfinite().all()
    assert losses.requires_grad
    assert correct.dtype == torch.bool
    assert correct.item() == has_share


class NotingScaler:
    """As torch's GradScaler, with a scale of 1,024, and a note of each call."""

    def __init__(self):
        self.calls = []

    def scale(self, loss):
        self.calls.append("scale")
        return 1024 * loss

    def unscale_(self, optimizer):
        self.calls.append("unscale_")
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad /= 1024

    def step(self, optimizer):
        self.calls.append("step")
        optimizer.step()

    def update(self):
        self.calls.append("update")


def test_a_scaled_loss_gives_the_same_step():
    """Under fp16: the gradient is clipped when it has its own size again."""
    trainer = make_pretraining()
    trainer.scaler = NotingScaler()
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(1)
    index = torch.tensor([7, 2, 9, 4, 0, 5])
    before = state_of(trainer.model)

    trainer.train_step(index, uniforms, 1, 0)
    slow.train_step(index, uniforms, 1, 0)
    assert trainer.scaler.calls == ["scale", "unscale_", "step", "update"]
    assert_same_change(before, state_of(trainer.model), state_of(slow.model))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_the_network_runs_in_the_precision_of_the_flag(precision, dtype):
    """What its convolutions give; the loss and the bank are float32 in any case."""
    trainer = make_pretraining("--precision", precision)
    trainer.model.float()
    for state in trainer.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()
    trainer.image_view.register_forward_hook(lambda *hooked: hooked[2].float())
    trainer.pretext.register_forward_hook(lambda *hooked: hooked[2].float())
    types = set()
    trainer.model.trunk.layer4[0].conv2.register_forward_hook(
        lambda *hooked: types.add(hooked[2].dtype)
    )
    index = torch.arange(6)
    uniforms = trainer.epoch_uniforms(1)
    _, losses, _ = trainer.forward_batch(index, uniforms, 1, 0)
    assert types == {dtype}
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    assert losses.dtype == trainer.bank.vectors.dtype == torch.float32


def test_full_batches_of_training_alone_run_compiled_and_over_the_ranks(monkeypatch):
    """DistributedDataParallel has no gradients to average in validation."""
    trainer = make_pretraining()
    uniforms = trainer.epoch_uniforms(1)
    images = trainer.images[:4]
    stances = []
    over_the_ranks = []

    def network(*inputs):
        over_the_ranks.append(True)
        return trainer.model(*inputs)

    def set_stance(stance):
        stances.append(stance)
        return contextlib.nullcontext()

    trainer.network = network
    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    for training in (True, False):
        for full_batch in (True, False):
            trainer.model.train(training)
            over_the_ranks.clear()
            trainer.run_network(images, uniforms[:4], full_batch)
            assert bool(over_the_ranks) == training
    assert stances == ["default", "force_eager", "force_eager", "force_eager"]

    stances.clear()
    for index in (torch.arange(6), torch.arange(4)):
        trainer.train_step(index, uniforms, 1, 0)
    assert stances == ["default", "force_eager"], "--batch-size is 6"


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
def test_the_learning_rate_of_every_step(warmup_steps):
    """Three steps per epoch; the run begins in epoch 2, and the cosine ends after 4."""
    args = SimpleNamespace(
        lr=0.5, warmup_steps=warmup_steps, tmax_for_cos_decay=4, cont_epoch=2
    )
    for epoch in range(2, 7):
        for step in range(3):
            epochs_done = epoch - 1 + step / 3
            expected = 0.5 * (1 + math.cos(math.pi * epochs_done / 4)) / 2
            if epochs_done >= 4:
                expected = 0
            steps_of_this_run = 3 * (epoch - 2) + step + 1
            if steps_of_this_run < warmup_steps:
                expected *= steps_of_this_run / warmup_steps
            rate = pirl_stl_train_test.learning_rate(args, epoch, step, 3)
            assert rate == pytest.approx(expected, abs=1e-12), (epoch, step)


@pytest.mark.parametrize("flags", ALL_LOSSES)
def test_validation(flags):
    """Eight images in batches of six and two, in eval mode, by the training's rules."""
    trainer = make_pretraining(*flags.split())
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(2)
    before = state_of(trainer.model)
    bank_before = trainer.bank.vectors.clone()
    trainer.model.train()  # as training leaves it
    with_gradients = []
    trainer.model.register_forward_hook(
        lambda *_: with_gradients.append(torch.is_grad_enabled())
    )

    result = pirl_stl_train_test.validate(trainer, uniforms, 2)

    assert with_gradients == [False, False], "they would take memory for nothing"
    assert result == pytest.approx(slow.validate(uniforms, 2), rel=1e-4)
    bank = trainer.bank.vectors
    torch.testing.assert_close(bank.double(), slow.bank, rtol=0, atol=2e-5)
    rows_of_training = slice(None, TRAIN_IMAGES)
    assert bank[rows_of_training].equal(bank_before[rows_of_training])
    assert (bank[TRAIN_IMAGES:] != bank_before[TRAIN_IMAGES:]).any(1).all()

    # It trains nothing, and leaves the running statistics alone.
    for name, value in trainer.model.state_dict().items():
        assert value.equal(before[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_accuracies_above_are_not_all_trivial():
    """Of the images that they look at, some answers are correct and some are not."""
    trainer = make_pretraining()
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(2)
    _, accuracy = slow.validate(uniforms, 2)
    assert 0 < accuracy < 1
    _, correct = slow.train_step(torch.arange(TRAIN_IMAGES), uniforms, 2, 0)
    assert 0 < correct < TRAIN_IMAGES


def test_validation_takes_the_running_statistics_of_rank_0(monkeypatch):
    """Two ranks; the totals of the batches are summed over both, in double precision.

    A float32 total of 2^24 would stay the same whatever is added.
    """
    trainer = make_pretraining("--batch-size", 4)
    uniforms = trainer.epoch_uniforms(1)
    sums = iter([2.0**24, 1.0])
    broadcast = []
    reduced = []

    def forward_batch(index, uniforms, epoch, step):
        vectors = torch.ones(len(index), 128)
        losses = torch.tensor([next(sums), 0, 0, 0])
        return vectors, losses, torch.tensor([True, True, False, False])

    def take_over(buffer, rank):
        broadcast.append((buffer.data_ptr(), rank))

    connection = SimpleNamespace(broadcast=take_over, all_reduce=reduced.append)
    monkeypatch.setattr(pirl_stl_train_test, "distributed", connection)
    monkeypatch.setattr(trainer, "forward_batch", forward_batch)
    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 2)
    result = pirl_stl_train_test.validate(trainer, uniforms, 1)

    assert result == ((2**24 + 1) / VALIDATION_IMAGES, 0.5)
    assert len(reduced) == 2
    assert broadcast == [(buffer.data_ptr(), 0) for buffer in trainer.model.buffers()]


def test_validation_without_images():
    trainer = make_pretraining()
    trainer.images = trainer.images[:TRAIN_IMAGES]
    uniforms = trainer.epoch_uniforms(1)
    assert pirl_stl_train_test.validate(trainer, uniforms, 1) == (None, None)


# ---- Random numbers, and where tensors are made --------------------------------------
def test_order_views_and_bank_are_functions_of_the_seed():
    """Each has a stream of its own, which no other use of random numbers moves."""
    trainer = make_pretraining("--seed", 5)
    torch.manual_seed(7)  # as if much had been drawn meanwhile
    torch.rand(3)

    generator = make_generator("cpu", 5, ORDER, 2)
    order = torch.randperm(TRAIN_IMAGES, generator=generator)
    batches = trainer.epoch_batches(2)
    assert [len(batch) for batch in batches] == [6, 4]
    assert torch.cat(batches).equal(order)

    images = TRAIN_IMAGES + VALIDATION_IMAGES
    generator = make_generator("cpu", 5, VIEWS, 2)
    uniforms = torch.rand(images, 96, generator=generator)
    assert trainer.epoch_uniforms(2).equal(uniforms)

    generator = make_generator("cpu", 5, BANK)
    vectors = torch.randn(images, 128, generator=generator)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(trainer.bank.vectors, vectors)


def test_a_step_makes_no_tensor_on_another_device():
    """Where device= is forgotten, a tensor would be made on the default device.

    Here that is "meta", whose tensors have no numbers: the step would be another one.
    """
    trainer = make_pretraining()
    other_trainer = make_pretraining()
    uniforms = trainer.epoch_uniforms(1)
    index = torch.arange(6)
    totals = trainer.train_step(index, uniforms, 1, 0)
    with torch.device("meta"):
        same_totals = other_trainer.train_step(index, uniforms, 1, 0)
        assert trainer.epoch_uniforms(2).device == CPU
    assert totals.equal(same_totals)
    assert trainer.bank.vectors.equal(other_trainer.bank.vectors)


# ---- The exported trunk --------------------------------------------------------------
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


def test_the_exported_statistics_are_of_whole_training_images():
    trainer = make_pretraining("--batch-size", 5)
    trainer.model.float()
    before = state_of(trainer.model)

    exported = trainer.exported_trunk()

    batches = trainer.images[:TRAIN_IMAGES].split(5)
    statistics = slow_statistics(trainer.model.trunk, batches)
    assert len(statistics) > 10
    assert_statistics(exported.state_dict(), statistics)
    for name, parameter in exported.named_parameters():
        assert parameter.equal(before[f"trunk.{name}"]), name

    # The trunk that is trained keeps its own.
    for name, value in trainer.model.state_dict().items():
        assert value.equal(before[name]), name


def test_a_part_of_the_training_images_is_enough_for_the_statistics(monkeypatch):
    monkeypatch.setattr(pirl_stl_train_test, "STATISTICS_IMAGES", 7)
    trainer = make_pretraining()
    trainer.model.float()
    statistics = slow_statistics(trainer.model.trunk, trainer.images[:7].split(4))
    assert_statistics(trainer.exported_trunk().state_dict(), statistics)


# ---- A whole run of pretraining ------------------------------------------------------
def note_calls(monkeypatch, owner, name, note):
    """note(its arguments, its result) whenever owner.name has been called."""
    function = getattr(owner, name)

    def noting(*arguments, **options):
        result = function(*arguments, **options)
        note(arguments, result)
        return result

    monkeypatch.setattr(owner, name, noting)


def test_a_run_of_pretraining(call, tiny, tmp_path, monkeypatch):
    """Three epochs of five steps, kNN in the second and in the last, then the export.

    Checkpoints are due all the time: one comes after every step, before validation.
    """
    module = pirl_stl_train_test
    events = []
    indices = {}
    sums = {}
    validated = {}
    uniforms_of = {}
    trainers = []

    def after_step(arguments, totals):
        trainer, index, uniforms, epoch, step = arguments
        trainers.append(trainer)
        assert step == len(indices.setdefault(epoch, []))
        indices[epoch].append(index)
        uniforms_of.setdefault(epoch, uniforms)
        assert uniforms.equal(uniforms_of[epoch])
        sums[epoch] = sums.get(epoch, 0) + totals
        events.append("step")

    def after_validation(arguments, result):
        _, uniforms, epoch = arguments
        assert uniforms.equal(uniforms_of[epoch])
        validated[epoch] = result
        events.append("validate")

    note_calls(monkeypatch, module.PretrainingTrainer, "train_step", after_step)
    note_calls(monkeypatch, module, "validate", after_validation)
    knn = []

    def after_knn(arguments, accuracy):
        knn.append(accuracy)
        events.append("kNN")

    note_calls(monkeypatch, module, "monitor_accuracy", after_knn)
    note_calls(monkeypatch, module, "log_epoch", lambda *_: events.append("log"))
    note_calls(
        monkeypatch,
        Experiment,
        "save_checkpoint",
        lambda *_: events.append("checkpoint"),
    )
    note_calls(monkeypatch, module, "export", lambda *_: events.append("export"))

    # fmt: off
    outcome = call(
        "pirl_stl_train_test", *tiny, "--epochs", 3, "--knn-every", 2,
        "--checkpoint-minutes", 0, "--experiment-name", "exp", "--lr", 0.1,
    )
    # fmt: on
    assert outcome.status == 0, outcome.err

    training = ["step", "checkpoint"] * 5
    plain_epoch = [*training, "validate", "log"]
    measured_epoch = [*training, "validate", "kNN", "log"]
    assert events == [
        *plain_epoch,
        *measured_epoch,
        *measured_epoch,
        "checkpoint",
        "export",
    ]

    # Each epoch sees each training image once, in another order and by other views.
    orders = [torch.cat(indices[epoch]) for epoch in (1, 2, 3)]
    for order in orders:
        assert order.sort().values.equal(torch.arange(70))
    assert not orders[0].equal(orders[1])
    assert not orders[1].equal(orders[2])
    assert not uniforms_of[1].equal(uniforms_of[2])
    assert not uniforms_of[2].equal(uniforms_of[3])

    # The record, and the finished model: the weights of the end.
    content = weights(tmp_path, "exp")
    history = content["history"]
    rates = []
    for number, metrics in enumerate(history):
        epoch = number + 1
        assert metrics["epoch"] == epoch
        means = [sums[epoch][0].item() / 70, sums[epoch][1].item() / 70]
        train_means = [metrics["train_loss"], metrics["train_acc"]]
        assert train_means == pytest.approx(means, rel=1e-5)
        assert (metrics["val_loss"], metrics["val_acc"]) == validated[epoch]
        last_step = (epoch - 1) * 5 + 4
        cosine_decay = 0.5 * (1 + math.cos(math.pi * last_step / 15))
        rates.append(pytest.approx(0.1 * (last_step + 1) / 100 * cosine_decay))
    assert [metrics["learning_rate"] for metrics in history] == rates
    assert [metrics["knn_acc"] for metrics in history] == [None, *knn]

    trainer = trainers[0]
    trunk = trainer.model.trunk
    for name, parameter in trunk.named_parameters():
        assert parameter.equal(content["trunk"][name]), name
    for part in ("head_f", "head_g"):
        for name, value in getattr(trainer.model, part).state_dict().items():
            assert value.equal(content[part][name]), name
    batches = trainer.images[:70].split(14)  # 5 of at most 16
    assert_statistics(content["trunk"], slow_statistics(trunk, batches))

    assert content["kind"] == "PIRL weights"
    assert content["images"] == 70
    assert content["pixel_mean"] == (0.4467, 0.4398, 0.4066)
    assert content["pixel_std"] == (0.2603, 0.2566, 0.2713)
    settings = content["settings"]
    assert settings["lr"] == 0.1
    assert settings["epochs"] == 3
    assert settings["experiment_name"] == "exp"

    # The last checkpoint is of the same moment, validation's bank rows included.
    saved = checkpoint(tmp_path, "exp")
    assert saved["training"]["epoch"] == 4
    assert saved["training"]["history"] == history
    assert saved["bank"]["vectors"].equal(trainer.bank.vectors)
    for name, value in trunk.state_dict().items():
        assert value.equal(saved["trunk"][name]), name


# ---- Fine-tuning ---------------------------------------------------------------------
def make_fine_tuning(tiny, *flags, path=None, content=None):
    """Fine-tuning of a random trunk, or of the weights in `content`, from `path`."""
    parser = train_stl_after_ssl.make_parser()
    args = parser.parse_args([str(flag) for flag in (*tiny, *flags)])
    args.stem = "imagenet"
    args.precision = "fp32"
    return train_stl_after_ssl.FineTuningTrainer(args, CPU, path, content or {})


def slow_cross_entropy(logits, labels):
    """The mean of −log softmax, by loops."""
    losses = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        total = sum(logit.exp() for logit in row)
        losses.append(-(row[label].exp() / total).log())
    return sum(losses) / len(losses)


def test_two_steps_of_fine_tuning(tiny):
    """View, cross entropy, momentum, weight decay; every weight, no frozen mode."""
    flags = ("--full-lr", 0.2, "--lr", 0.7, "--weight-decay", 0.05)
    trainer = make_fine_tuning(tiny, *flags, "--zero-init", "False")
    make_precise(trainer, trainer.view)
    trainer.averaged_model.double()
    slow_model = plain_copy(trainer.model)
    sgd = MomentumSGD(slow_model.parameters(), 0.05)
    uniforms = trainer.epoch_uniforms(1)

    for index in trainer.train_index[:16].flip(0).split(8):
        before = state_of(trainer.model)
        trainer.model.eval()  # as validation leaves it
        totals = trainer.train_step(index, uniforms)

        slow_model.train()
        images = trainer.images[index].float()
        labels = trainer.labels[index]
        logits = slow_model(trainer.view(images, uniforms[index]))
        loss = slow_cross_entropy(logits, labels)
        sgd.step(torch.autograd.grad(loss, sgd.parameters), lr=0.2)

        correct = (logits.argmax(1) == labels).sum().item()
        assert totals.tolist() == pytest.approx([8 * loss.item(), correct], rel=1e-4)
        assert_same_change(before, state_of(trainer.model), state_of(slow_model))
    assert trainer.full_steps == 2


def test_the_average_of_the_weights(tiny):
    """After n steps: a ← d·a + (1 − d)·w with d = min(n / (n + 9), 0.99)."""
    trainer = make_fine_tuning(tiny, "--zero-init", "False", "--full-lr", 0.2)
    trainer.model.double()
    trainer.averaged_model.double()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.2)
    trainer.view.register_forward_hook(lambda *arguments: arguments[2].double())
    uniforms = trainer.epoch_uniforms(1)

    average = {name: torch.zeros(()) for name in trainer.model.state_dict()}
    for steps, decay in {0: 0, 1: 0.1, 2: 2 / 11, 890: 890 / 899, 5000: 0.99}.items():
        trainer.full_steps = steps
        trainer.train_step(trainer.train_index[:8], uniforms)
        assert trainer.full_steps == steps + 1
        averaged_state = trainer.averaged_model.state_dict()
        for name, weight in trainer.model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            average[name] = decay * average[name] + (1 - decay) * weight
            torch.testing.assert_close(averaged_state[name], average[name])


def test_validation_of_fine_tuning(tiny):
    """The average, on plain validation images, in eval mode; nothing changes."""
    trainer = make_fine_tuning(tiny, "--zero-init", "False")
    with torch.no_grad():
        # The features of a random trunk nearly coincide: their differences must count.
        trainer.averaged_model.softmax_layer.weight *= 100
    slow_model = plain_copy(trainer.averaged_model).eval()
    before = state_of(trainer.averaged_model)
    trainer.averaged_model.train()

    loss, accuracy = trainer.validate()

    images = trainer.images[trainer.val_index]
    labels = trainer.labels[trainer.val_index]
    with torch.no_grad():
        logits = slow_model(plain(images).double())
    assert loss == pytest.approx(slow_cross_entropy(logits, labels).item(), rel=1e-3)
    shares = (logits.argmax(1) == labels).double()
    assert accuracy == pytest.approx(shares.mean().item())
    for name, value in trainer.averaged_model.state_dict().items():
        assert value.equal(before[name]), name


def test_a_random_trunk_begins_with_statistics_of_the_training_split(tiny):
    trainer = make_fine_tuning(tiny, "--batch-size", 25)
    assert len(trainer.train_index) == 50
    batches = trainer.images[trainer.train_index].split(25)
    statistics = slow_statistics(trainer.model.trunk, batches)
    assert_statistics(trainer.model.trunk.state_dict(), statistics)


def test_a_checkpoint_s_trunk_begins_with_statistics_of_plain_images(
    finished, tiny, tmp_path
):
    """It has those of augmented views."""
    finished("exp")
    path, content = read_weights("exp.ckpt", tmp_path / "weights")
    flags = ("--batch-size", 25)
    trainer = make_fine_tuning(tiny, *flags, path=path, content=content)
    batches = trainer.images[trainer.train_index].split(25)
    statistics = slow_statistics(trainer.model.trunk, batches)
    assert_statistics(trainer.model.trunk.state_dict(), statistics)


def test_order_and_views_of_fine_tuning_are_functions_of_the_seed(tiny):
    trainer = make_fine_tuning(tiny, "--seed", 5)
    torch.manual_seed(7)
    order = torch.randperm(50, generator=make_generator("cpu", 5, ORDER, 2))
    assert torch.cat(trainer.epoch_batches(2)).equal(trainer.train_index[order])
    uniforms = torch.rand(60, 7, generator=make_generator("cpu", 5, VIEWS, 2))
    assert trainer.epoch_uniforms(2).equal(uniforms)


def test_knn_searches_the_training_split_alone(tiny):
    """Validation images would find themselves: their features say nothing else."""
    trainer = make_fine_tuning(tiny)
    generator = torch.Generator().manual_seed(3)
    plain_features = torch.randn(60, 64, generator=generator)
    mirrored = torch.randn(60, 64, generator=generator)
    test_features = torch.randn(40, 64, generator=generator)
    train = trainer.train_index
    validation = trainer.val_index
    labels = trainer.labels
    plain_features[train, labels[train]] += 20
    test_features[torch.arange(40), trainer.test_labels] += 20

    def features(images, flip=False):
        if images is trainer.test_images:
            return test_features
        return mirrored if flip else plain_features

    trainer.features = features
    train_stl_after_ssl.train_softmax_layer(trainer)
    val_accuracy, test_accuracy = trainer.results["neighbours"]
    known = (plain_features[train], labels[train])
    expected = knn_accuracy(*known, plain_features[validation], labels[validation])
    assert val_accuracy == expected < 0.8
    assert test_accuracy == 1


def test_a_fold_trains_and_chooses_by_its_own_images_alone(tiny, monkeypatch):
    trainer = make_fine_tuning(tiny)
    folds = [torch.arange(20), torch.arange(15, 55)]
    trainer.folds = folds
    fits = []

    def note(arguments, result):
        fits.append((arguments, result))

    note_calls(monkeypatch, train_stl_after_ssl, "fit_softmax_layer", note)
    train_stl_after_ssl.train_softmax_layer(trainer)

    splits = [(fold, fold) for fold in folds]
    splits.append((trainer.train_index, trainer.val_index))
    for (arguments, _), (train, validation) in zip(fits, splits, strict=True):
        assert arguments[2].equal(train)
        assert arguments[3].equal(validation)

    features = trainer.features(trainer.test_images)
    for (_, fit), found in zip(fits[:2], trainer.results["folds"], strict=True):
        layer, val_accuracy, _ = fit
        _, accuracy = linear_probe.evaluate(layer, features, trainer.test_labels)
        assert found == (val_accuracy, accuracy)


def test_the_neighbours_shown_are_training_images_with_their_classes(
    tiny, tmp_path, monkeypatch
):
    trainer = make_fine_tuning(tiny, "--neighbours", tmp_path / "n.png")
    shown = []
    module = train_stl_after_ssl
    monkeypatch.setattr(module, "neighbour_picture", lambda *parts: shown.extend(parts))
    monkeypatch.setattr(module, "save_picture", lambda *_: None)
    module.draw_neighbours(trainer, trainer.test_images, trainer.test_labels)

    _, query_labels, found, found_labels, _ = shown
    assert query_labels.tolist() == list(range(10))
    assert found.shape[:2] == found_labels.shape == (10, 5)
    training = set(trainer.train_index.tolist())
    for image, label in zip(found.flatten(0, 1), found_labels.flatten(), strict=True):
        is_image = (trainer.images == image).flatten(1).all(1)
        (row,) = is_image.nonzero().flatten().tolist()
        assert row in training
        assert trainer.labels[row] == label


def test_the_softmax_stage_lowers_its_learning_rate():
    """Training gets better all the time; what validates has the wrong labels."""
    labels = torch.tensor([0, 1] * 10 + [1, 0] * 5)
    features = torch.tensor([-1.0, 1.0] * 15)[:, None].expand(2, 30, 1)
    args = SimpleNamespace(
        lr=0.1,
        weight_decay=0,
        patience_for_lr_decay=1,
        epochs=6,
        batch_size=8,
        seed=5,
    )
    fit = linear_probe.fit_softmax_layer
    _, _, history = fit(features, labels, torch.arange(20), torch.arange(20, 30), args)
    rates = [metrics["learning_rate"] for metrics in history]
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 2 + [0.001])


def test_the_softmax_stage(tiny):
    """Both views, the split, and the weights of the first of the best epochs."""
    lr = 0.3
    decay = 0.01
    epochs = 6
    seed = 39
    # With this seed, the fourth epoch is the best, and the last one is as good.
    flags = ("--seed", seed, "--epochs", epochs, "--lr", lr, "--weight-decay", decay)
    trainer = make_fine_tuning(tiny, *flags)
    labels = trainer.labels
    train = trainer.train_index
    validation = trainer.val_index
    trunk = plain_copy(trainer.model.trunk).eval()
    before = state_of(trainer.model.trunk)

    history = train_stl_after_ssl.train_softmax_layer(trainer)

    with torch.no_grad():
        plain_features = trunk(plain(trainer.images).double())
        mirrored_features = trunk(plain(trainer.images.flip(3)).double())
        test_features = trunk(plain(trainer.test_images).double())
    known = torch.cat([plain_features[train], mirrored_features[train]])
    mean = known.mean(0)
    scale = known.std(0).clamp(min=1e-5) / 0.25
    views = [(plain_features - mean) / scale, (mirrored_features - mean) / scale]

    weight = torch.zeros(10, 64, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    sgd = MomentumSGD([weight, bias], decay)
    accuracies = []
    kept = []
    for epoch in range(1, epochs + 1):
        order, chosen = linear_probe.epoch_order(train, 2, seed, epoch)
        assert sorted(order.tolist()) == sorted(train.tolist())
        assert set(chosen.tolist()) == {0, 1}
        pairs = list(zip(order.tolist(), chosen.tolist(), strict=True))
        loss_sum = 0
        correct = 0
        for start in range(0, len(pairs), 16):
            batch = pairs[start : start + 16]
            features = torch.stack([views[view][image] for image, view in batch])
            batch_labels = labels[[image for image, _ in batch]]
            logits = features @ weight.T + bias
            loss = slow_cross_entropy(logits, batch_labels)
            sgd.step(torch.autograd.grad(loss, [weight, bias]), lr)
            loss_sum += len(batch) * loss.item()
            correct += (logits.argmax(1) == batch_labels).sum().item()

        with torch.no_grad():
            logits = views[0][validation] @ weight.T + bias
        loss = slow_cross_entropy(logits, labels[validation]).item()
        shares = (logits.argmax(1) == labels[validation]).double()
        accuracies.append(shares.mean().item())
        kept.append((weight.detach().clone(), bias.detach().clone()))
        metrics = history[epoch - 1]
        assert metrics["stage"] == "softmax"
        assert metrics["epoch"] == epoch
        assert metrics["learning_rate"] == lr
        assert metrics["train_loss"] == pytest.approx(loss_sum / 50, rel=1e-3)
        assert metrics["train_acc"] == pytest.approx(correct / 50)
        assert metrics["val_loss"] == pytest.approx(loss, rel=1e-3)
        assert metrics["val_acc"] == pytest.approx(accuracies[-1])

    best = accuracies.index(max(accuracies))
    assert 0 < best < epochs - 1, "else this test could not tell which is kept"
    assert accuracies[-1] == accuracies[best]
    best_weight, best_bias = kept[best]
    layer = trainer.model.softmax_layer
    standard_weight = layer.weight.double() * scale
    standard_bias = layer.bias.double() + layer.weight.double() @ mean
    torch.testing.assert_close(standard_weight, best_weight, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(standard_bias, best_bias, rtol=1e-2, atol=1e-3)

    test_logits = ((test_features - mean) / scale) @ best_weight.T + best_bias
    test_shares = (test_logits.argmax(1) == trainer.test_labels).double()
    expected = (accuracies[best], test_shares.mean().item())
    assert trainer.results["softmax"] == pytest.approx(expected)
    for name, value in trainer.model.trunk.state_dict().items():
        assert value.equal(before[name]), "the trunk is frozen"


def test_a_run_of_fine_tuning(call, tiny, tmp_path, monkeypatch):
    """Four epochs: order, views, learning rate, and the best average in the file."""
    fine_tuning = train_stl_after_ssl.FineTuningTrainer
    indices = []
    uniforms_seen = []
    states = []
    rates = []
    trainers = []
    sums = []
    results = [(1.0, 0.3), (2.0, 0.5), (3.0, 0.2), (4.0, 0.5)]

    def after_step(arguments, totals):
        trainer, index, uniforms = arguments
        trainers.append(trainer)
        indices.append(index)
        uniforms_seen.append(uniforms)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        sums.append(totals)

    def validate(trainer):
        states.append(state_of(trainer.averaged_model))
        return results[len(states) - 1]

    note_calls(monkeypatch, fine_tuning, "train_step", after_step)
    monkeypatch.setattr(fine_tuning, "validate", validate)
    # fmt: off
    outcome = call(
        "train_stl_after_ssl", *tiny, "--full-fine-tune", "--full-epochs", 4,
        "--full-lr", 0.05, "--patience-for-lr-decay", 1, "--experiment-name", "exp",
    )
    # fmt: on
    assert outcome.status == 0, outcome.err

    # 50 images in batches of 16: four steps per epoch.
    assert len(indices) == 16
    train = trainers[0].train_index
    orders = [torch.cat(indices[first : first + 4]) for first in (0, 4, 8, 12)]
    for order in orders:
        assert order.sort().values.equal(train)
    assert not orders[0].equal(orders[1])
    assert not uniforms_seen[0].equal(uniforms_seen[4])
    assert uniforms_seen[4].equal(uniforms_seen[7])

    # After more than one epoch without a lower loss, a tenth of the learning rate.
    assert rates == pytest.approx([0.05] * 12 + [0.005] * 4)

    # Of two epochs with the same accuracy, the first one is kept.
    content = weights(tmp_path, "exp")
    for name, value in content["trunk"].items():
        assert value.equal(states[1][f"trunk.{name}"]), name
    for name, value in content["softmax_layer"].items():
        assert value.equal(states[1][f"softmax_layer.{name}"]), name
    validation_accuracy, test_accuracy = content["results"]["full"]
    assert validation_accuracy == 0.5

    model = plain_copy(trainers[0].model).eval()
    with torch.no_grad():
        logits = model(plain(trainers[0].test_images).double())
    shares = (logits.argmax(1) == trainers[0].test_labels).double()
    assert test_accuracy == pytest.approx(shares.mean().item())

    full_history = content["history"][2:]
    assert [metrics["stage"] for metrics in full_history] == ["full"] * 4
    pairs = [(metrics["val_loss"], metrics["val_acc"]) for metrics in full_history]
    assert pairs == results
    for number, metrics in enumerate(full_history):
        loss, accuracy = sum(sums[4 * number : 4 * number + 4]) / 50
        assert metrics["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["train_acc"] == pytest.approx(accuracy.item())
    assert content["pixel_mean"] == (0.4467, 0.4398, 0.4066)
    assert content["pixel_std"] == (0.2603, 0.2566, 0.2713)
    assert content["classes"] == [str(number) for number in range(1, 11)]
