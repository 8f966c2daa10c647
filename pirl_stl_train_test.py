"""Pretrain a ResNet without labels by PIRL (Misra & van der Maaten, arXiv:1912.01991) on the images of STL-10.

python pirl_stl_train_test.py --model-type res18 --batch-size 128 --lr 0.1 --experiment-name exp
"""

import functools
import math
import os
import shutil
import time

import run_helpers as rh
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce

import dataset_helpers as dh
import models
from jigsaw import JIGSAW_DRAWS, jigsaw_view
from memory_bank import MemoryBank

DEFAULT_NEGATIVES = 6400
STATISTICS_IMAGES = 4096  # at most so many training images for the exported batch-norm statistics
GRADIENT_NORM = 2.0  # the usual norm is above 10 at first, so a step then has the length 2 · lr, whatever the loss
ADVICE = "lower --lr, raise --temp-parameter or --warmup-steps, or use --precision fp32"
# What a resumed run may change, and what it keeps from its checkpoint unless the flag is given again.
MAY_DIFFER = rh.MAY_DIFFER | {"epochs", "knn_every", "tensorboard", "compile", "tmax_for_cos_decay"}
KEPT = ("precision", "tmax_for_cos_decay", "warm_start", "pirl_model_name", "cont_epoch")


def parse_args(argv=None):
    parser = rh.Parser(__doc__.split("\n")[0])
    rh.add_run_arguments(parser, experiment="e1_resnet18_")
    switch, number = rh.switch, rh.between
    add = parser.add_argument_group("images").add_argument
    add("--only-train", **switch(False), help="whether to train on all unlabelled images instead of 70 %%")
    add("--image-size", type=number(int, 36, 224), default=96, help="the side of the images in pixels, once read")
    add("--crop-area", type=number(float, 0.01, 1), default=0.2, help="smallest crop, as a fraction of the image area")
    add("--colour-strength", type=number(float, 0, 2), default=0.5, help="strength of the colour jitter, 0 for none")
    add = parser.add_argument_group("network").add_argument
    add("--model-type", choices=[*models.TRUNKS], default="res18", help="the trunk: ResNet-18, -34 or -50")
    add("--stem", choices=["imagenet", "small"], default="imagenet", help="small: a first convolution of stride 1")
    add("--zero-init", **switch(True), help="whether every residual block starts as its shortcut")
    add("--non-linear-head", **switch(False), help="whether a ReLU and a further linear layer follow each head")
    add("--compile", **switch(False), help="whether to use torch.compile for the trunk and the augmentations")
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["modified-nce", "nce"], default="modified-nce", help="nce is the paper's equation 5")
    add("--positive", choices=["bank", "pair"], default="bank", help="what g(φ(I_t)) is pulled to: m_I, or f(φ(I))")
    add("--loss-weight", type=number(float, 0, 1), default=0.5, help="λ: the weight of the jigsaw term")
    add("--temp-parameter", type=number(float, 0.01, 100), default=0.07, help="τ: the temperature")
    add("--count-negatives", type=number(int, 1), help=f"K, of the bank; None is {DEFAULT_NEGATIVES}, or all if fewer")
    add("--batch-negatives", **switch(True), help="whether the f(φ(I)) of the batch's other images are negatives too")
    add("--beta", type=number(float, 0, 0.999), default=0.5, help="β: the weight of the past in the memory bank")
    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=number(int, 1), default=128, help="images per step, of all ranks together")
    add("--epochs", type=number(int, 1), default=100, help="passes over the training images")
    add("--lr", type=number(float, 0, 100), default=0.2, help="peak learning rate of SGD with momentum 0.9")
    add("--warmup-steps", type=number(int, 0), default=100, help="steps in which the learning rate rises from 0")
    add("--tmax-for-cos-decay", type=number(int, 1), help="epochs until the learning rate reaches 0; None is --epochs")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4, help="weight decay of all weights")
    add("--knn-every", type=number(int, 0), default=5, help="epochs between measurements of kNN accuracy, 0 for none")
    add("--tensorboard", **switch(False), help="whether to write a TensorBoard log too")
    add("--warm-start", **switch(False), help="whether to start from --pirl-model-name, or this name's finished model")
    add("--pirl-model-name", help="with --warm-start: a file of weights, or a name in the weights folder")
    add("--cont-epoch", type=number(int, 1), help="with --warm-start: the number of the first epoch; None is 1")
    args = parser.parse_args(argv)
    if not args.warm_start and not args.resume and (args.pirl_model_name or args.cont_epoch):
        parser.error("--pirl-model-name and --cont-epoch need --warm-start True")
    if (args.cont_epoch or 1) > args.epochs:
        parser.error(f"--cont-epoch {args.cont_epoch} is after the last epoch, --epochs {args.epochs}")
    return args


def main():
    args = parse_args()
    device = rh.choose_device(args)
    rh.join_ranks(device)
    experiment = rh.Experiment(args, "PIRL checkpoint")
    checkpoint = experiment.start(lambda c: MAY_DIFFER, KEPT, own_name=args.warm_start and not args.pirl_model_name)
    settle(args, device, checkpoint)
    images, train_count, checksum = dh.load_unlabelled(args, device)
    check(args, train_count)
    run = Pretraining(args, device, images, train_count)
    progress = rh.Progress(experiment, run, train_count, "epoch", ADVICE)
    save = functools.partial(experiment.save, checksum, run, progress)
    if checkpoint:
        experiment.load(checkpoint, checksum, run, progress)
    elif args.warm_start:
        warm_start(run, progress, experiment)
        save()  # in the place of what an earlier run of this name has left
    rh.same_on_all_ranks(checksum, progress.epoch, progress.step)
    labelled = load_monitor(args, device) if args.knn_every and rh.RANK == 0 else None
    writer = tensorboard_writer(experiment, progress.epoch) if args.tensorboard and rh.RANK == 0 else None
    announce(run, progress)
    while progress.epoch <= args.epochs:
        epoch, started = progress.epoch, time.monotonic() - progress.seconds
        order = torch.randperm(train_count, generator=rh.generator("cpu", args.seed, rh.ORDER, epoch)).to(device)
        draws = run.view_draws(epoch)
        for index in progress.steps(order.split(args.batch_size), save):
            progress.sums[progress.step] = run.step(index, draws, epoch, progress.step)
        row = progress.row(validate(run, draws, epoch), run.optimizer)
        due = labelled and (epoch % args.knn_every == 0 or epoch == args.epochs)
        row["knn_acc"] = neighbours(run, labelled) if due else None
        row["seconds"] = round(time.monotonic() - started, 2)
        progress.finish_epoch(row)
        report(row, args.epochs, writer)
    save()
    export(run, progress, experiment)


# ---- The loss --------------------------------------------------------------------------------------------------------
def candidate_logits(u, w, negatives, hidden, temperature):
    """[s(u, w), s(w, m_1), …, s(w, m_K)] / τ: the positive and the negatives among which it is to be found.

    u, w [..., B, 128] and negatives [C, 128] are unit vectors, hidden [B, C] is True where m_k is no negative of that
    image: its logit is −∞. Returns [..., B, 1 + C]. (C is K + 1 and more: see MemoryBank.draw_negatives.)
    """
    positive = (u * w).sum(-1, keepdim=True)
    against_bank = (w @ negatives.T).masked_fill(hidden, -math.inf)
    return torch.cat([positive, against_bank], -1) / temperature


def modified_nce(logits):
    """−log h(u, w): the negative log probability of the positive, column 0 (equation 4). [..., 1 + K] -> [...]."""
    return -F.log_softmax(logits, -1)[..., 0]


def nce(logits):
    """−log h(u, w) − Σ_k log(1 − h(w, m_k)) (equations 4 and 5). [..., 1 + K] -> [...].

    h(w, m_k) is the probability of column k. Where that is near 1, 1 − h is lost to rounding; only the largest can be,
    and for it log(1 − h) is the log-sum-exp of the other columns less that of all.
    """
    log_h = F.log_softmax(logits, -1)
    top = log_h.argmax(-1, keepdim=True)
    others, whole = logits.scatter(-1, top, -math.inf).logsumexp(-1, True), logits.logsumexp(-1, True)
    log_not = torch.log1p(-log_h.scatter(-1, top, -math.inf).exp()).scatter(-1, top, others - whole)
    return -log_h[..., 0] - log_not[..., 1:].sum(-1)


def pirl_loss(image_vectors, patch_vectors, memory, negatives, hidden, args, fresh=None):
    """L = λ · loss(partner, g(φ(I_t))) + (1 − λ) · loss(m_I, f(φ(I))) (equation 6), and the pretext hits.

    The partner of g(φ(I_t)) is m_I, or f(φ(I)) for --positive pair. image_vectors, patch_vectors [B, 128] of the
    network, memory [B, 128] the images' own rows of the bank, negatives [C, 128], hidden [B, C]. fresh is further
    negatives: f(φ(I)) [B', 128] of a whole batch, and which row is the image itself [B, B'] bool. Returns the loss [B]
    and hits [B] bool: whether m_I is more similar to g(φ(I_t)) than every negative from the bank is. All in float32.
    """
    from_bank = slice(1, 1 + len(negatives))  # columns of the logits; column 0 is the positive
    if fresh is not None:
        negatives = torch.cat([negatives, F.normalize(fresh[0].float(), dim=1)])
        hidden = torch.cat([hidden, fresh[1]], 1)
    g, f = vectors = F.normalize(torch.stack([patch_vectors, image_vectors]).float(), dim=2)
    partners = torch.stack([memory if args.positive == "bank" else f, memory])
    logits = candidate_logits(partners, vectors, negatives, hidden, args.temp_parameter)  # [2, B, 1 + C]
    jigsaw_term, image_term = {"modified-nce": modified_nce, "nce": nce}[args.loss](logits)
    hits = (memory * g).sum(1) / args.temp_parameter > logits[0, :, from_bank].amax(1) + 1e-4  # a tie is no hit
    return args.loss_weight * jigsaw_term + (1 - args.loss_weight) * image_term, hits


# ---- Training --------------------------------------------------------------------------------------------------------
class Pretraining:
    """Network, optimiser and memory bank, and a step of training with them."""

    def __init__(self, args, device, images, train_count):
        """images uint8 [N, 3, S, S] on the device: `train_count` to train on, then those of validation."""
        self.args, self.device, self.images, self.train_count = args, device, images, train_count
        self.negatives = args.count_negatives or min(DEFAULT_NEGATIVES, train_count - 1)
        self.epoch_steps = math.ceil(train_count / args.batch_size)
        torch.manual_seed(rh.derived_seed(args.seed, rh.INITIAL_WEIGHTS))
        model = models.PIRL(args.model_type, args.non_linear_head, args.stem, args.zero_init)
        self.model = self.network = model.to(device, memory_format=torch.channels_last)
        if rh.RANKS > 1:  # each rank normalises its own share of a batch
            self.network = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.views = views
        if args.compile:
            self.model.trunk.compile(dynamic=False)
            self.views = torch.compile(views, dynamic=False)
        rates = {"lr": args.lr, "momentum": 0.9, "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **rates, fused=True)
        draw = rh.generator(device, args.seed, rh.BANK)
        vectors = torch.randn(len(images), models.VECTOR_SIZE, generator=draw, device=device)
        self.bank = MemoryBank(vectors, train_count, args.beta)

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "bank")}

    def load_state_dict(self, state):
        for name in ("model", "optimizer", "bank"):
            getattr(self, name).load_state_dict(state[name])

    def view_draws(self, epoch):
        """The random numbers of every image's two views in this epoch, float32 [N, 96]."""
        columns = dh.IMAGE_VIEW_DRAWS + JIGSAW_DRAWS
        return dh.uniform_draws(len(self.images), columns, self.args.seed, rh.VIEWS, epoch, device=self.device)

    def step(self, index, draws, epoch, step):
        """One step of SGD on the images `index` [B], then the bank's update. Returns [sum of losses, hits]."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.args, epoch, step, self.epoch_steps)
        self.model.train()
        image_vectors, losses, hits = self.losses(index, draws, epoch, step)
        self.optimizer.zero_grad()
        (losses.sum() * rh.RANKS / len(index)).backward()  # the ranks' gradients are averaged
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        self.bank.update(index, image_vectors)
        return self.sums(losses, hits)

    def losses(self, index, draws, *step_key):
        """Both views of the images `index` [B] to the loss: (f(φ(I)) [B, 128] detached, losses, hits).

        Of several ranks each does its share: its losses and hits are [B / ranks], the vectors are those of all.
        """
        args, shares = self.args, index.tensor_split(rh.RANKS)
        share = shares[rh.RANK]
        mine = share if len(share) else index[:1]  # all ranks take part in the step; this one's part will not count
        images, draws = self.images.index_select(0, mine), draws.index_select(0, mine)
        # Compiled code serves the steps of full size; the few others would each need a compilation of their own.
        full = self.model.training and len(index) == args.batch_size
        network = self.network if self.model.training else self.model
        with torch.compiler.set_stance("default" if full else "force_eager"):
            view, patches = self.views(images, draws, args.crop_area, args.colour_strength)
            with rh.autocast(self.device, args.precision):
                image_vectors, patch_vectors = network(view, patches)
        all_vectors = image_vectors.float()
        if rh.RANKS > 1:  # those of all ranks, in the batch's order; gradients flow back to each
            first = sum(map(len, shares[: rh.RANK]))
            others = (0, 0, first, len(index) - first - len(share))
            all_vectors = all_reduce(F.pad(all_vectors[: len(share)], others))
        draw = rh.generator(self.device, args.seed, rh.NEGATIVES, *step_key)  # the same negatives on all ranks
        negatives, hidden = self.bank.draw_negatives(mine, self.negatives, draw)
        fresh = (all_vectors, mine[:, None] == index) if args.batch_negatives else None
        losses, hits = pirl_loss(image_vectors, patch_vectors, self.bank.vectors[mine], negatives, hidden, args, fresh)
        if len(share) == 0:
            losses, hits = losses * 0, hits * 0
        return all_vectors.detach(), losses, hits

    def sums(self, losses, hits):
        """[sum of the losses, number of hits] of a batch, over all ranks, on the device."""
        sums = torch.stack([losses.detach().sum(), hits.sum()])
        if rh.RANKS > 1:
            distributed.all_reduce(sums)
        return sums

    def plain_trunk(self):
        """A copy of the trunk with the batch-norm statistics of whole training images as they are: what users get."""
        images = self.images[: min(self.train_count, STATISTICS_IMAGES)]
        return models.plain_statistics(self.model.trunk, images, self.args.batch_size)


def views(images, draws, crop_area, strength):
    """Both views of images uint8 [B, 3, S, S] by random numbers [B, 96]: [B, 3, S, S] and [B·9, 3, P, P]."""
    images, (image_draws, jigsaw_draws) = images.float(), draws.split([dh.IMAGE_VIEW_DRAWS, JIGSAW_DRAWS], 1)
    return dh.image_view(images, image_draws, crop_area, strength), jigsaw_view(images, jigsaw_draws, strength)


def learning_rate(args, epoch, step, steps):
    """Linear warm-up, and half a cosine from --lr to 0 over --tmax-for-cos-decay epochs; after them it stays at 0."""
    passed = min(epoch - 1 + step / steps, args.tmax_for_cos_decay)
    warm_up = min(1.0, ((epoch - args.cont_epoch) * steps + step + 1) / max(1, args.warmup_steps))
    return args.lr * warm_up * (1 + math.cos(math.pi * passed / args.tmax_for_cos_decay)) / 2


@torch.no_grad()
def validate(run, draws, epoch):
    """(loss, share of hits) of the validation images, None without any; running statistics for whole images."""
    if rh.RANKS > 1:
        for buffer in run.model.buffers():  # each rank has those of its own shares
            distributed.broadcast(buffer, 0)
    index = torch.arange(run.train_count, len(run.images), device=run.device)
    if not len(index):
        return None, None
    sums = torch.zeros(2, device=run.device)
    run.model.eval()
    for step, batch in enumerate(index.split(run.args.batch_size)):
        image_vectors, losses, hits = run.losses(batch, draws, epoch, run.epoch_steps + step)
        run.bank.update(batch, image_vectors)
        sums += run.sums(losses, hits)
    return (sums.cpu().double() / len(index)).tolist()


def neighbours(run, labelled):
    """Nearest-neighbour accuracy of 16 % of the labelled training images among the others. No test image is read."""
    images, labels, search, query = labelled
    features = models.trunk_features(run.plain_trunk(), images, run.args.batch_size)
    return models.neighbour_accuracy(features[search], labels[search], features[query], labels[query])


# ---- The run's beginning, its record and its end ---------------------------------------------------------------------
def settle(args, device, checkpoint):
    """Fill in the arguments that depend on others or on the machine."""
    args.precision = rh.choose_precision(args, device)
    args.cont_epoch = args.cont_epoch or 1
    if checkpoint and args.epochs > args.tmax_for_cos_decay:
        longer = f"--tmax-for-cos-decay {args.epochs} would make it a cosine of {args.epochs} epochs"
        print(f"note: the learning rate is 0 from the end of epoch {args.tmax_for_cos_decay} on; {longer}")
    args.tmax_for_cos_decay = args.tmax_for_cos_decay or args.epochs
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise rh.UserError("--compile needs a C++ compiler, and none was found: install g++, or leave --compile out")


def check(args, train_count):
    """Refuse numbers that do not go with the number of images or of ranks."""
    size, negatives, ranks = args.batch_size, args.count_negatives or 0, rh.RANKS
    if train_count < 3:
        raise rh.UserError(f"{train_count} training images are too few: add images")
    if ranks > 1 and (size % ranks or size < 2 * ranks):
        raise rh.UserError(f"--batch-size {size} does not give {ranks} ranks two images or more each: use a multiple")
    if size > train_count:
        raise rh.UserError(f"--batch-size {size} is more than the {train_count} training images: choose a smaller one")
    if negatives > train_count - 1:
        raise rh.UserError(f"--count-negatives {negatives} is more than the {train_count - 1} other images: lower it")


def warm_start(run, progress, experiment):
    """Start from a file of weights, at --cont-epoch. Under the run's own name its record is continued."""
    args = run.args
    path, weights = models.read_weights(args.pirl_model_name or experiment.model_file, args.weights_dir)
    models.load_weights(dict(run.model.named_children()), weights, path)
    progress.epoch = args.cont_epoch
    if not args.pirl_model_name:
        progress.rows = [row for row in weights.get("rows", []) if row["epoch"] < progress.epoch]


def load_monitor(args, device):
    """(images, labels, search, query) of the labelled training images; None, and a note, if they cannot be used."""
    folder = args.data_dir / "train"
    try:
        images, labels, *_ = dh.load_labelled(folder, args.image_size, device)
        return images, labels, *dh.stratified_split(labels, args.seed, folder)
    except rh.UserError as error:
        print(f"note: no nearest-neighbour accuracy will be measured: {error}")


def announce(run, progress):
    """Say what is about to be done."""
    args, device, ranks = run.args, run.device.type, f", {rh.RANKS} ranks" if rh.RANKS > 1 else ""
    side, spare = args.image_size, len(run.images) - run.train_count
    all_others = " (all other training images)" if run.negatives == run.train_count - 1 else ""
    epochs = f"epochs {progress.epoch} to {args.epochs}" if progress.epoch <= args.epochs else "all epochs are done"
    print(f"{args.experiment_name}: PIRL, {args.model_type}, {device}, {args.precision}, seed {args.seed}{ranks}")
    print(f"  {run.train_count} training images of {side} × {side} pixels, {spare} for validation")
    print(f"  {run.epoch_steps} steps of {args.batch_size} per epoch, {epochs}")
    print(f"  {run.negatives} negatives{all_others}, loss {args.loss}, --positive {args.positive}", flush=True)


def report(row, epochs, writer):
    """The epoch's line on the screen, and its numbers in TensorBoard's log."""
    texts = {"train_loss": "loss {:.4f}", "train_acc": "pretext {:.2%}", "val_loss": "validation loss {:.4f}"}
    texts |= {"val_acc": "pretext {:.2%}", "knn_acc": "kNN {:.1%}", "images_per_second": "{:.1f} images/s"}
    line = ", ".join(text.format(row[name]) for name, text in texts.items() if row[name] is not None)
    print(f"epoch {row['epoch']}/{epochs}: {line}", flush=True)
    for name, value in row.items() if writer else ():
        if value is not None:
            writer.add_scalar(name, value, row["epoch"])
            writer.flush()


def tensorboard_writer(experiment, epoch):
    """Scalars under the CSV's names; what an interrupted run wrote from this epoch on is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise rh.UserError("--tensorboard needs a package that is missing: pip install tensorboard") from None
    return SummaryWriter(experiment.observations.with_name(f"{experiment.name}_tensorboard"), purge_step=epoch)


def export(run, progress, experiment):
    """<experiment>.pt: the trunk under torchvision's names, the heads, and how they came about."""
    if rh.RANK == 0:
        parts = {"trunk": run.plain_trunk(), "head_f": run.model.head_f, "head_g": run.model.head_g}
        experiment.export(parts, progress, images=run.train_count, pixel_mean=dh.MEAN, pixel_std=dh.STD)
        print(f"wrote {experiment.model_file}, {experiment.checkpoint_file} and {experiment.observations}")


if __name__ == "__main__":
    rh.run_script(main)
