"""Pretrain a ResNet without labels by PIRL (Misra & van der Maaten, arXiv:1912.01991) on the images of STL-10.

python pirl_stl_train_test.py --model-type res18 --batch-size 128 --lr 0.1 --experiment-name exp
"""

import copy
import csv
import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce

from dataset_helpers import (
    CLASSES,
    COLOUR_STRENGTH,
    CROP_AREA,
    HUE,
    IMAGE_VIEW_DRAWS,
    MEAN,
    STD,
    image_view,
    load_labelled,
    load_unlabelled,
    normalised,
    progress_bar,
    stratified_split,
    uniform_draws,
    unlabelled_files,
    unlabelled_split,
)
from jigsaw import JIGSAW_DRAWS, jigsaw_view
from memory_bank import MemoryBank
from models import (
    PIRL,
    VECTOR_SIZE,
    batch_statistics,
    estimate_statistics,
    neighbour_accuracy,
    trunk_features,
)
from run_helpers import (
    BANK,
    INITIAL_WEIGHTS,
    NEGATIVES,
    ORDER,
    VIEWS,
    Experiment,
    Parser,
    StopSignal,
    Ticker,
    UserError,
    add_run_arguments,
    autocast,
    check_fields,
    check_position,
    check_rows,
    choose_device,
    choose_precision,
    cpu_state,
    damaged,
    derived_seed,
    epoch_means,
    find_weights,
    generator,
    join_ranks,
    load_optimizer,
    load_weights,
    machine,
    note_incomplete,
    number,
    rank,
    read_torch_file,
    run_script,
    settings_of,
    whole_file,
    world_size,
)

DEFAULT_NEGATIVES = 6400
FEWEST_STEPS = 1000  # that a run should have: see the rows of batch sizes in benchmarks/recipe.md
STATISTICS_IMAGES = 4096  # for the exported batch-norm statistics
GRADIENT_NORM = 2.0  # the usual norm is above 10 at first, so a step then has the length 2 · lr, whatever the loss
# What a resumed run may change. (--epochs only with the --tmax-for-cos-decay that it had.)
MAY_DIFFER = {"data_dir", "weights_dir", "observations_dir", "device", "resume", "epochs", "checkpoint_minutes"}
MAY_DIFFER |= {"knn_every", "tensorboard"}
COLUMNS = ["epoch", "train_loss", "val_loss", "train_acc", "val_acc", "learning_rate", "images_per_second", "seconds"]
COLUMNS += ["knn_acc"]


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add_run_arguments(parser, experiment="e1_resnet18_")
    add = parser.add_argument
    add(
        "--batch-size",
        type=number(int, 1),
        help=f"images per step (default: 128, or 64 or 32 where the run would have less than {FEWEST_STEPS} steps)",
    )
    add("--epochs", type=number(int, 1), default=100, help="passes over the training images")
    add("--lr", type=number(float, 0, 100), default=0.2, help="learning rate of SGD (momentum 0.9) after the warm-up")
    add("--warmup-steps", type=number(int, 0), default=100, help="the learning rate rises over them from 0")
    add("--tmax-for-cos-decay", type=number(int, 1), help="epochs until the cosine reaches 0 (default: --epochs)")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4, help="of the weights")
    parser.add_switch("--decay-norms", True, "of batch norm's weights and of the biases too")
    share, strength = number(float, 0.01, 1), number(float, 0, 2)
    add("--crop-area", type=share, default=CROP_AREA[0], help="of image views at least, as a share of the image")
    add("--colour-strength", type=strength, default=COLOUR_STRENGTH, help="of image views' colour jitter; 0 is none")
    add("--patch-colour-strength", type=strength, default=COLOUR_STRENGTH, help="the same for patches")
    add("--hue", type=number(float, 0, 0.5), default=HUE, help="how far colours turn, of a full turn")
    add("--loss", choices=["modified-nce", "nce"], default="modified-nce", help="nce: the paper's equation 5")
    add("--positive", choices=["bank", "pair"], default="bank", help="what g(φ(I_t)) is pulled to: m_I, or f(φ(I))")
    add("--loss-weight", type=number(float, 0, 1), default=0.5, help="λ: the share of the jigsaw term")
    add("--temp-parameter", type=number(float, 0.01, 100), default=0.07, help="temperature τ")
    add(
        "--count-negatives",
        type=number(int, 1),
        help=f"K, from the memory bank (default: {DEFAULT_NEGATIVES}, or all other training images if fewer)",
    )
    add("--beta", type=number(float, 0, below=1), default=0.5, help="β: the weight of the past in the memory bank")
    parser.add_switch("--batch-negatives", True, "the fresh f(φ(I)) of the batch's other images are negatives too")
    add(
        "--bank-start",
        choices=["features", "random", "visited"],
        default="features",
        help="a forward pass; random vectors; or a forward pass, but images are negatives only once they were visited",
    )
    add(
        "--stem", choices=["imagenet", "small"], default="imagenet", help="first convolution: 7 × 7 by 2, or 3 × 3 by 1"
    )
    parser.add_switch("--zero-init", True, "every residual block of the trunk starts as its shortcut")
    parser.add_switch("--non-linear-head", False, "a ReLU and a further linear layer behind each head")
    parser.add_switch("--only-train", False, "train on all unlabelled images instead of 70 %%")
    add(
        "--val-images",
        type=number(int, 1),
        help="validate on at most so many of the other 30 %% (default: 4 %% of those to train on, from 256 to 4096)",
    )
    parser.add_switch("--warm-start", False, "start from the weights of this experiment, or of --pirl-model-name")
    add("--pirl-model-name", help="with --warm-start: a path, or a name under the weights folder")
    add("--cont-epoch", type=number(int, 1), default=1, help="with --warm-start: the epoch to go on with")
    parser.add_switch("--compile", False, "torch.compile the trunk for full training batches")
    add("--knn-every", type=number(int, 0), default=5, help="epochs between measurements of the features; 0 is none")
    parser.add_switch("--tensorboard", False, "write <observations-dir>/<experiment>_tensorboard, too")
    args = parser.parse_args(argv)
    args.tmax_for_cos_decay = args.tmax_for_cos_decay or args.epochs
    if not args.warm_start and (args.pirl_model_name or args.cont_epoch != 1):
        parser.error("--pirl-model-name and --cont-epoch need --warm-start True")
    if args.cont_epoch > args.epochs:
        parser.error(f"--cont-epoch {args.cont_epoch} lies behind the last of --epochs {args.epochs}")
    return args


def main():
    args = parse_args()
    device = choose_device(args)
    join_ranks(device)
    if args.batch_size is None:
        train, _ = unlabelled_split(len(unlabelled_files(args.data_dir)), args.seed, args.only_train)
        args.batch_size = default_batch_size(len(train), args.tmax_for_cos_decay)
    experiment = Experiment(args, "PIRL checkpoint")
    checkpoint = experiment.load_checkpoint(settings_of(args), MAY_DIFFER) if args.resume else None
    if checkpoint is None and not (args.warm_start and not args.pirl_model_name):
        experiment.refuse_taken_name(args.resume)
    run = start_run(args, device)
    if checkpoint is not None:
        resume(run, checkpoint, experiment)
    else:
        if args.resume:
            print(f"there is no {experiment.checkpoint} yet: starting from the beginning")
        if args.warm_start:
            warm_start(run, experiment)
    same_on_all_ranks(run, checkpoint is not None)
    experiment.check_space(run.model, 1, run.bank.vectors.nbytes)
    announce(run)
    if args.tensorboard and rank() == 0:
        run.writer = tensorboard_writer(experiment, run.epoch)
    if args.warm_start and checkpoint is None:
        experiment.save_first(state_of(run))
    if run.step == 0 and run.epoch == args.cont_epoch:
        start_bank(run)
    stop = StopSignal()
    while run.epoch <= args.epochs:
        train = train_epoch(run, experiment, stop)
        started = time.monotonic()
        knn_accuracy = monitor(run, experiment, stop)
        validation = validate(run, experiment, stop)
        finish_epoch(run, experiment, train, validation, knn_accuracy, run.seconds + time.monotonic() - started)
    export(run, experiment)
    if run.ranks > 1:
        distributed.destroy_process_group()


def default_batch_size(images, epochs):
    """128; in short runs, where the number of steps decides, 64 or 32, but never more than there are images."""
    enough = [size for size in (128, 64, 32) if images * epochs >= FEWEST_STEPS * size]
    return min(enough[0] if enough else 32, images)


@dataclass
class Run:
    """All that a training step reads and changes."""

    args: object
    device: torch.device
    precision: str
    images: torch.Tensor  # uint8 [N, 3, S, S]: the training images, then those of validation
    train_count: int
    checksum: int  # of the images
    negatives: int  # K
    labelled: tuple  # images, labels, search and query indices of the monitor; None without it
    model: PIRL
    network: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    bank: MemoryBank
    statistics: torch.Tensor  # [steps, 2] on the device: sum of losses and count of hits of this epoch's steps so far
    epoch: int = 1
    step: int = 0  # the next one of this epoch
    writer: object = None  # of TensorBoard
    seconds: float = 0.0  # spent on this epoch's steps
    rows: list = field(default_factory=list)  # of the CSV

    ranks: int = field(default_factory=world_size)

    @property
    def steps(self):  # per epoch
        return len(self.statistics)


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def candidate_logits(u, w, negatives, hidden, temperature):
    """[s(u, w), s(w, m_1), …, s(w, m_K)] / τ: the positive and the negatives among which it is to be found.

    u, w [B, 128] and negatives [C, 128] are unit vectors, hidden [B, C] is True where m_k is no negative of that
    image: its logit is −∞. Returns [B, 1 + C]. (C is K + 1 and more: see MemoryBank.draw_negatives.)
    """
    positive = (u * w).sum(1, keepdim=True)
    against_bank = (w @ negatives.T).masked_fill(hidden, -math.inf)
    return torch.cat([positive, against_bank], 1) / temperature


def modified_nce(logits):
    """−log h(u, w): the negative log probability of the positive, column 0 (equation 4). [B, 1 + K] -> [B]."""
    return -F.log_softmax(logits, 1)[:, 0]


def nce(logits):
    """−log h(u, w) − Σ_k log(1 − h(w, m_k)) (equations 4 and 5). [B, 1 + K] -> [B].

    h(w, m_k) is the probability of column k. Where that is near 1, 1 − h is lost to rounding; only the largest can be,
    and for it log(1 − h) is the log-sum-exp of the other columns less that of all.
    """
    log_h = F.log_softmax(logits, 1)
    top = log_h.argmax(1, keepdim=True)
    log_not_top = logits.scatter(1, top, -math.inf).logsumexp(1, keepdim=True) - logits.logsumexp(1, keepdim=True)
    log_not = torch.log1p(-log_h.scatter(1, top, -math.inf).exp()).scatter(1, top, log_not_top)
    return -log_h[:, 0] - log_not[:, 1:].sum(1)


def pirl_loss(image_vectors, patch_vectors, memory, negatives, hidden, args, fresh=None):
    """L = λ · loss(partner, g(φ(I_t))) + (1 − λ) · loss(m_I, f(φ(I))) (equation 6), and the pretext hits.

    The partner of g(φ(I_t)) is m_I, or f(φ(I)) for --positive pair. image_vectors, patch_vectors [B, 128] of the
    network, memory [B, 128] the images' own rows of the bank, negatives [C, 128], hidden [B, C]. fresh is further
    negatives: f(φ(I)) [B', 128] of a whole batch, and which row is the image itself [B, B'] bool. Returns the loss [B]
    and hits [B] bool: whether m_I is more similar to g(φ(I_t)) than every negative from the bank is. All in float32.
    """
    f, g = F.normalize(image_vectors.float(), dim=1), F.normalize(patch_vectors.float(), dim=1)
    from_bank, compared = slice(1, 1 + len(negatives)), ~hidden.all(1)
    if fresh is not None:
        negatives = torch.cat([negatives, F.normalize(fresh[0].float(), dim=1)])
        hidden = torch.cat([hidden, fresh[1]], 1)
    loss = {"modified-nce": modified_nce, "nce": nce}[args.loss]
    partner = memory if args.positive == "bank" else f
    logits_g = candidate_logits(partner, g, negatives, hidden, args.temp_parameter)
    logits_f = candidate_logits(memory, f, negatives, hidden, args.temp_parameter)
    hits = compared & ((memory * g).sum(1) / args.temp_parameter > logits_g[:, from_bank].amax(1))
    return args.loss_weight * loss(logits_g) + (1 - args.loss_weight) * loss(logits_f), hits


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def forward(run, index, draws, step_key):
    """Both views of the images `index` [B] to the loss: (f(φ(I)) [B, 128] detached, losses, hits).

    Of several ranks each does its share of the batch: its losses and hits are [B / ranks], the vectors are all ranks'.
    """
    args, shares = run.args, index.tensor_split(run.ranks)
    share = shares[rank()]
    mine = share if len(share) else index[:1]  # all ranks take part in the step; this one's part will not count
    images = run.images.index_select(0, mine).float()
    image_draws, jigsaw_draws = draws.index_select(0, mine).split([IMAGE_VIEW_DRAWS, JIGSAW_DRAWS], 1)
    view = image_view(images, image_draws, args.crop_area, args.colour_strength, args.hue)
    patches = jigsaw_view(images, jigsaw_draws, args.patch_colour_strength, args.hue)
    # Compiled code serves the training steps of full size; the few others would each need a compilation of their own.
    full = run.model.training and len(index) == args.batch_size
    network = run.network if run.model.training else run.model
    with torch.compiler.set_stance("default" if full else "force_eager"), autocast(run.device, run.precision):
        image_vectors, patch_vectors = network(view, patches)
    all_vectors = image_vectors.float()
    if run.ranks > 1:
        all_vectors = gathered(all_vectors[: len(share)], sum(map(len, shares[: rank()])), len(index))
    draw = generator(run.device, args.seed, NEGATIVES, *step_key)  # the same negatives on all ranks
    negatives, hidden = run.bank.draw_negatives(mine, run.negatives, draw)
    memory, fresh = run.bank.vectors[mine], None
    if args.batch_negatives:
        fresh = all_vectors, mine[:, None] == index
    losses, hits = pirl_loss(image_vectors, patch_vectors, memory, negatives, hidden, args, fresh)
    if len(share) == 0:
        losses, hits = losses * 0, hits * 0
    return all_vectors.detach(), losses, hits


def gathered(vectors, first, count):
    """The rows of all ranks' shares of a batch, in the batch's order, on every rank. Gradients flow back to each.

    vectors [b, 128] of this rank, which are the rows from `first` on of the whole [count, 128].
    """
    return all_reduce(F.pad(vectors, (0, 0, first, count - first - len(vectors))))


def training_step(run, index, draws):
    """One step of SGD on the images `index`, then the bank's update. Returns [sum of losses, hits] on the device."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.args, run.epoch, run.step, run.steps)
    image_vectors, losses, hits = forward(run, index, draws, (run.epoch, run.step))
    run.optimizer.zero_grad()
    (losses.sum() * run.ranks / len(index)).backward()  # the ranks' gradients are averaged
    nn.utils.clip_grad_norm_(run.model.parameters(), GRADIENT_NORM)
    run.optimizer.step()
    run.bank.update(index, image_vectors)
    return sums_of(run, losses, hits)


def sums_of(run, losses, hits):
    """[sum of the losses, number of hits] of a batch, over all ranks."""
    sums = torch.stack([losses.detach().sum(), hits.sum()])
    if run.ranks > 1:
        distributed.all_reduce(sums)
    return sums


def learning_rate(args, epoch, step, steps):
    """Linear warm-up, and half a cosine from --lr to 0 over --tmax-for-cos-decay epochs (as CosineAnnealingLR: past
    that it rises again)."""
    passed = epoch - 1 + step / steps
    warm_up = min(1.0, ((epoch - 1) * steps + step + 1) / max(1, args.warmup_steps))
    return args.lr * warm_up * (1 + math.cos(math.pi * passed / args.tmax_for_cos_decay)) / 2


def train_epoch(run, experiment, stop):
    """The rest of the epoch, from run.step on: (mean loss, share of hits). On a signal writes a checkpoint and ends."""
    args = run.args
    order = torch.randperm(run.train_count, generator=generator("cpu", args.seed, ORDER, run.epoch)).to(run.device)
    draws = view_draws(run, run.epoch)
    if run.step == 0:
        run.statistics.zero_()
        run.seconds = 0.0
    shown, kept = Ticker(1), Ticker(60 * args.checkpoint_minutes)
    run.model.train()
    bar = progress_bar(run.train_count, f"epoch {run.epoch}/{args.epochs}", " images", run.step * args.batch_size)
    with bar:
        started = time.monotonic() - run.seconds
        for index in order.split(args.batch_size)[run.step :]:
            # On GPUs several ranks ask one another at every 16th step only: their hosts need not run in step.
            ask = run.ranks == 1 or run.device.type == "cpu" or run.step % 16 == 0
            number, due = agreed(run, stop, kept) if ask else (0, False)
            if number or due:
                means_so_far(run, experiment)
                run.seconds = time.monotonic() - started
                if number:
                    bar.close()
                    leave(run, experiment, number)
                experiment.save_checkpoint(state_of(run))
            run.statistics[run.step] = training_step(run, index, draws)
            run.step += 1
            bar.update(len(index))
            if shown.due():  # reading numbers back waits for the device: about once a second
                loss, hits = means_so_far(run, experiment)
                bar.set_postfix_str(f"loss {loss:.3f}, pretext {hits:.1%}{knn_text(run.rows)}")
        means = means_so_far(run, experiment)
        run.seconds = time.monotonic() - started
    return means


def agreed(run, stop, kept=None):
    """(number of a signal or 0, whether a checkpoint is due): the same on all ranks, whichever got the signal."""
    flags = [stop.number or 0, bool(kept and rank() == 0 and kept.due())]
    if run.ranks == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return flags.tolist()


def leave_if_asked(run, experiment, stop):
    """On a signal, write the checkpoint and end the process. For what follows an epoch's last step."""
    if number := agreed(run, stop)[0]:
        leave(run, experiment, number)


def leave(run, experiment, number):
    """Write the checkpoint and end the process, as a signal asked."""
    experiment.save_checkpoint(state_of(run))
    if run.ranks > 1:
        distributed.barrier()  # the launcher stops all ranks when one has ended
    print(f"stopped in epoch {run.epoch} after step {run.step}; --resume True with the same command goes on")
    sys.exit(128 + number)


def view_draws(run, epoch):
    """The random numbers of every image's two views in this epoch, float32 [N, 96]."""
    columns = IMAGE_VIEW_DRAWS + JIGSAW_DRAWS
    return uniform_draws(len(run.images), columns, run.args.seed, VIEWS, epoch, device=run.device)


def means_so_far(run, experiment):
    """(loss, share of hits) of the epoch so far. Waits for the device; ends the run if a number is not finite."""
    advice = "lower --lr, raise --temp-parameter or --warmup-steps, or use --precision fp32"
    images = min(run.step * run.args.batch_size, run.train_count)
    return epoch_means(run.statistics[: run.step], images, run.model, f"epoch {run.epoch}", advice, experiment)


@torch.no_grad()
def validate(run, experiment, stop):
    """(loss, share of hits) of the validation images, None without any; running statistics for whole images.

    A signal ends the run with the checkpoint of the moment before validation.
    """
    count = len(run.images) - run.train_count
    if not count:
        return None, None
    if run.ranks > 1:
        for buffer in run.model.buffers():  # on CPUs each rank has those of its own shares
            distributed.broadcast(buffer, 0)
    index = torch.arange(run.train_count, len(run.images), device=run.device)
    draws = view_draws(run, run.epoch)
    sums, before = torch.zeros(2, device=run.device), run.bank.vectors[index]
    run.model.eval()
    for step, batch in enumerate(index.split(run.args.batch_size)):
        image_vectors, losses, hits = forward(run, batch, draws, (run.epoch, run.steps + step))
        run.bank.update(batch, image_vectors)
        sums += sums_of(run, losses, hits)
        if number := agreed(run, stop)[0]:
            run.bank.vectors[index] = before
            leave(run, experiment, number)
    return (sums.cpu().double() / count).tolist()


def monitor(run, experiment, stop):
    """Nearest-neighbour accuracy of 16 % of the labelled training images among the others, if it is due; else None.

    No test image is read. The trunk has the statistics of whole images, as in export(); training does not notice.
    """
    due = run.args.knn_every and (run.epoch % run.args.knn_every == 0 or run.epoch == run.args.epochs)
    if not due or run.labelled is None:
        return None
    images, labels, search, query = run.labelled
    trunk, look = copy.deepcopy(run.model.trunk), partial(leave_if_asked, run, experiment, stop)
    with torch.compiler.set_stance("force_eager"):
        whole_image_statistics(run, trunk, look)
        features = trunk_features(trunk, images, run.args.batch_size, look=look)
    return neighbour_accuracy(features[search], labels[search], features[query], labels[query], CLASSES)


def whole_image_statistics(run, trunk, look=None):
    estimate_statistics(trunk, run.images[: min(run.train_count, STATISTICS_IMAGES)], run.args.batch_size, look)


def knn_text(rows):
    """The last nearest-neighbour accuracy, for the bar."""
    values = [row["knn_acc"] for row in rows if row["knn_acc"] not in (None, "")]
    return f", kNN {float(values[-1]):.1%}" if values else ""


# ---------------------------------------------------------------------------------------------------------------------
# The run's beginning, its record and its end
# ---------------------------------------------------------------------------------------------------------------------


def start_run(args, device):
    """The images, after checking what depends on their size and number, and a run at its first step."""
    note_incomplete(args.data_dir)
    images, train_count, checksum = load_unlabelled(
        args.data_dir, args.image_size, device, args.seed, args.only_train, args.val_images
    )
    if args.batch_size % world_size():
        raise UserError(
            f"--batch-size {args.batch_size} cannot be divided over {world_size()} ranks: choose a multiple of them"
        )
    if args.batch_size > train_count:
        raise UserError(
            f"--batch-size {args.batch_size} is more than the {train_count} training images: choose a smaller one"
        )
    if (args.count_negatives or 0) > train_count - 1:
        raise UserError(
            f"--count-negatives {args.count_negatives} is more than the {train_count - 1} other training images: "
            "choose fewer, or leave it out to use them all"
        )
    run = make_run(args, device, images, train_count, checksum)
    if args.knn_every:
        run.labelled = load_monitor(args, device)
    return run


def load_monitor(args, device):
    """(images, labels, search, query) of the labelled training images; None, and a note, if there are none."""
    if not (args.data_dir / "train").is_dir():
        print(f"note: {args.data_dir / 'train'} does not exist: no nearest-neighbour accuracy will be measured")
        return None
    images, labels, _ = load_labelled(args.data_dir / "train", args.image_size, device)
    search, query = stratified_split(labels.cpu(), args.seed)
    return (images, labels, search.to(device), query.to(device)) if len(query) else None


def make_run(args, device, images, train_count, checksum):
    """Network, optimiser and a bank of random vectors for images uint8 [N, 3, S, S] on `device`."""
    torch.manual_seed(derived_seed(args.seed, INITIAL_WEIGHTS))
    model = PIRL(args.model_type, args.non_linear_head, args.stem, args.zero_init)
    model = model.to(device, memory_format=torch.channels_last)
    network = model
    if world_size() > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=device.type == "cpu")
    if args.compile:
        model.trunk.compile(dynamic=False)
    plain = [p for p in model.parameters() if p.ndim == 1 and not args.decay_norms]
    decayed = [p for p in model.parameters() if p.ndim > 1 or args.decay_norms]
    groups = [{"params": decayed}] + [{"params": plain, "weight_decay": 0.0}] * bool(plain)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    vectors = torch.randn(len(images), VECTOR_SIZE, generator=generator(device, args.seed, BANK), device=device)
    visited = torch.zeros(len(images), dtype=torch.bool, device=device) if args.bank_start == "visited" else None
    return Run(
        args=args,
        device=device,
        precision=choose_precision(args, device),
        images=images,
        train_count=train_count,
        checksum=checksum,
        negatives=args.count_negatives or min(DEFAULT_NEGATIVES, train_count - 1),
        labelled=None,
        model=model,
        network=network,
        optimizer=optimizer,
        bank=MemoryBank(vectors, train_count, args.beta, visited),
        statistics=torch.zeros(math.ceil(train_count / args.batch_size), 2, device=device),
    )


def same_on_all_ranks(run, resumed):
    """Refuse to begin if the ranks, on several nodes perhaps, have read other images or another checkpoint."""
    if run.ranks > 1:
        least = torch.tensor([run.checksum, resumed, run.epoch, run.step])
        most = least.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        if not least.equal(most):
            raise UserError(
                "the ranks have read other images or checkpoints than one another: name folders by --data-dir and "
                "--weights-dir that all of them see"
            )


def announce(run):
    """Say what is about to be done."""
    args, fewer = run.args, run.negatives < DEFAULT_NEGATIVES and not run.args.count_negatives
    print(
        f"{args.experiment_name}: PIRL, {args.model_type}, on {run.device.type} in {run.precision}, seed {args.seed}"
        f"{f', {run.ranks} ranks' if run.ranks > 1 else ''}\n"
        f"  {run.train_count} training images of {args.image_size} × {args.image_size} pixels, "
        f"{len(run.images) - run.train_count} for validation, {run.steps} steps of {args.batch_size} per epoch\n"
        f"  {run.negatives} negatives{' (all other training images; there are no 6400)' if fewer else ''}, "
        f"loss {args.loss} with positives of the {args.positive}, "
        + (f"epochs {run.epoch} to {args.epochs}" if run.epoch <= args.epochs else "all epochs done"),
        flush=True,
    )


@torch.no_grad()
def start_bank(run):
    """Fill the bank with f(φ(I)) of every image as it is, under batch statistics, unless --bank-start random."""
    if run.args.bank_start == "random":
        return
    vectors = []
    run.model.eval()
    eager = torch.compiler.set_stance("force_eager")
    bar = progress_bar(len(run.images), "filling the memory bank", " images")
    with eager, batch_statistics(run.model.trunk), autocast(run.device, run.precision), bar:
        for batch in run.images.split(run.args.batch_size):
            vectors.append(run.model.head_f(run.model.trunk(normalised(batch))).float())
            bar.update(len(batch))
    vectors = torch.cat(vectors)
    if run.ranks > 1:
        distributed.broadcast(vectors, 0)
    run.bank = MemoryBank(vectors, run.train_count, run.args.beta, run.bank.visited)


def warm_start(run, experiment):
    """Start from the weights of a finished run, at --cont-epoch; under the run's own name, its CSV is continued."""
    args = run.args
    path = find_weights(args.pirl_model_name, args.weights_dir) if args.pirl_model_name else experiment.model
    state = read_torch_file(path, "PIRL weights")
    for name, module in parts(run.model).items():
        load_weights(module, state.get(name), path)
    run.epoch = args.cont_epoch
    if experiment.observations.is_file():
        try:
            with open(experiment.observations, newline="") as file:
                run.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < run.epoch]
        except (ValueError, TypeError, KeyError, csv.Error):
            raise damaged(experiment.observations, "a row") from None
        check_rows(run.rows, COLUMNS, experiment.observations)
    print(f"starting from {path}, at epoch {run.epoch}")


def resume(run, checkpoint, experiment):
    """Put everything back to where the checkpoint was written."""
    check_fields(checkpoint, {"images": int}, experiment.checkpoint)
    if checkpoint["images"] != run.checksum:
        raise UserError(
            f"{experiment.checkpoint} is of other images than those in {run.args.data_dir}: give their --data-dir"
        )
    expected = {"model": dict, "optimizer": dict, "epoch": int, "step": int, "seconds": float, "rows": [dict]}
    expected |= {"bank": run.bank.vectors.shape, "statistics": run.statistics.shape}
    expected |= {"visited": None if run.bank.visited is None else run.bank.visited.shape}
    check_fields(checkpoint, expected, experiment.checkpoint)
    check_position(checkpoint, run.steps, experiment.checkpoint)
    check_rows(checkpoint["rows"], COLUMNS, experiment.checkpoint)
    for name, module in parts(run.model).items():
        load_weights(module, checkpoint["model"].get(name), experiment.checkpoint)
    load_optimizer(run.optimizer, checkpoint["optimizer"], experiment.checkpoint)
    run.bank.vectors.copy_(checkpoint["bank"])
    if run.bank.visited is not None:
        run.bank.visited.copy_(checkpoint["visited"])
    run.epoch, run.step = checkpoint["epoch"], checkpoint["step"]
    run.statistics.copy_(checkpoint["statistics"])
    run.seconds, run.rows = checkpoint["seconds"], checkpoint["rows"]
    experiment.write_rows(run.rows)
    print(f"going on from {experiment.checkpoint}: epoch {run.epoch}, after step {run.step}")


def tensorboard_writer(experiment, epoch):
    """Scalars under the CSV's names; what an interrupted run wrote from this epoch on is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package that is missing: pip install tensorboard") from None
    folder = experiment.observations.with_name(f"{experiment.name}_tensorboard")
    return SummaryWriter(folder, purge_step=epoch)


def parts(model):
    """The parts of the network under the names that they have in our files."""
    return {"trunk": model.trunk, "head_f": model.head_f, "head_g": model.head_g}


def state_of(run):
    """What resume() needs, for torch.save."""
    return {
        "settings": settings_of(run.args),
        "images": run.checksum,
        "model": {name: module.state_dict() for name, module in parts(run.model).items()},
        "optimizer": run.optimizer.state_dict(),
        "bank": run.bank.vectors,
        "visited": run.bank.visited,
        "epoch": run.epoch,
        "step": run.step,
        "statistics": run.statistics,
        "seconds": run.seconds,
        "rows": run.rows,
    }


def finish_epoch(run, experiment, train, validation, knn_accuracy, seconds):
    """The epoch's row of the CSV, its line on the screen, and the checkpoint at its end."""
    row = {
        "epoch": run.epoch,
        "train_loss": train[0],
        "val_loss": validation[0],
        "train_acc": train[1],
        "val_acc": validation[1],
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "images_per_second": round(run.train_count / run.seconds, 1),
        "seconds": round(seconds, 2),
        "knn_acc": knn_accuracy,
    }
    run.rows.append(row)
    text = f"epoch {run.epoch}/{run.args.epochs}: loss {train[0]:.4f}, pretext {train[1]:.2%}"
    if validation[0] is not None:
        text += f", validation loss {validation[0]:.4f}, pretext {validation[1]:.2%}"
    if knn_accuracy is not None:
        text += knn_text([row])
    print(f"{text}, {row['images_per_second']} images/s", flush=True)
    run.epoch, run.step = run.epoch + 1, 0
    experiment.save_checkpoint(state_of(run))
    experiment.write_rows(run.rows)
    if run.writer:
        for name, value in row.items():
            if value is not None:
                run.writer.add_scalar(name, value, row["epoch"])
        run.writer.flush()


def export(run, experiment):
    """<experiment>.pt: the trunk under torchvision's names, the heads, and how they came about.

    The batch-norm statistics that it is used with are those of whole images as they are, not of augmented ones.
    """
    with torch.compiler.set_stance("force_eager"):
        whole_image_statistics(run, run.model.trunk)
    if rank():
        return
    with whole_file(experiment.model) as file:
        torch.save(
            {
                "kind": "PIRL weights",
                "stem": run.args.stem,
                **{name: cpu_state(module) for name, module in parts(run.model).items()},
                "settings": settings_of(run.args),
                "images": run.train_count,
                "rows": run.rows,
                "machine": machine(run.device),
                "pixel_mean": MEAN,
                "pixel_std": STD,
            },
            file,
        )
    print(f"wrote {experiment.model}, {experiment.checkpoint} and {experiment.observations}")


if __name__ == "__main__":
    run_script(main)
