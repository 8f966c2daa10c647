"""Pretrain a ResNet without labels by PIRL (Misra & van der Maaten, arXiv:1912.01991).

python pirl_stl_train_test.py --model-type res18 --batch-size 128 --lr 0.1 \\
    --experiment-name exp
"""

import math
import os
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn

import augmentations
import dataset_helpers
import evaluation
import models
from checkpoints import (
    CHANGEABLE,
    Experiment,
    TrainingState,
    load_weights,
    read_weights,
    shared_settings,
)
from memory_bank import MemoryBank
from pretexts import PRETEXTS
from progress import LoopControl, progress_bar
from run_helpers import (
    BANK,
    INITIAL_WEIGHTS,
    NEGATIVES,
    ORDER,
    RANK,
    RANKS,
    VIEWS,
    Parser,
    UserError,
    add_run_arguments,
    autocast,
    bool_flag,
    bounded,
    choose_device,
    choose_precision,
    compare_ranks,
    derived_seed,
    gather_rows,
    join_ranks,
    make_generator,
    make_optimizer,
    make_scaler,
    non_empty,
    run_script,
    to_device,
)

DEFAULT_NEGATIVES = 6400
# How many training images the exported batch-norm statistics are computed on, at most.
STATISTICS_IMAGES = 4096
# The gradient's norm is above 10 at first. Clipped, the first steps are of about the
# same length whatever the loss is.
MAX_GRADIENT_NORM = 2.0


def make_parser():
    parser = Parser("Pretrain a ResNet without labels by PIRL on the images of STL-10.")
    add_run_arguments(parser, experiment="e1_resnet18_")
    # fmt: off
    add = parser.add_argument_group("images").add_argument
    add("--only-train", **bool_flag(False),
        help="whether to train on all unlabelled images instead of 70 %%")
    add("--image-size", type=bounded(int, 36, 224), default=96,
        help="images are resized and cropped to this side length in pixels")
    add("--crop-area", type=bounded(float, 0.01, 1), default=augmentations.CROP_AREA[0],
        help="smallest crop of the image view, as a fraction of the image's area")
    add("--colour-strength", type=bounded(float, 0, 2),
        default=augmentations.COLOUR_STRENGTH,
        help="strength of the colour jitter, 0 for none")
    add("--images-on", choices=["auto", "device", "host"], default="auto",
        help="where the images are kept; auto: on the device if they fit there")

    add = parser.add_argument_group("network").add_argument
    add("--model-type", choices=[*models.TRUNKS], default="res18",
        help="the trunk: ResNet-18, -34 or -50")
    add("--stem", choices=["imagenet", "small"], default="imagenet",
        help="small: a first convolution of stride 1")
    add("--zero-init", **bool_flag(True),
        help="whether every residual block starts as the identity"
             " (zero-initialised last batch norm)")
    add("--non-linear-head", **bool_flag(False),
        help="whether a ReLU and another linear layer follow each head")
    add("--compile", **bool_flag(False),
        help="whether to use torch.compile for the trunk and the augmentations")

    add = parser.add_argument_group("loss").add_argument
    add("--pretext", choices=[*PRETEXTS], default="jigsaw",
        help="the pretext task")
    add("--loss", choices=["modified-nce", "nce"], default="modified-nce",
        help="nce is the paper's equation 4")
    add("--positive", choices=["bank", "pair"], default="bank",
        help="what g(φ(I_t)) is pulled to: m_I, or f(φ(I))")
    add("--loss-weight", type=bounded(float, 0, 1), default=0.5,
        help="λ: the weight of the pretext term")
    add("--temp-parameter", type=bounded(float, 0.01, 100), default=0.07,
        help="τ: the temperature")
    add("--count-negatives", type=bounded(int, 1),
        help=f"K: negatives from the bank; defaults to {DEFAULT_NEGATIVES},"
             " or to all if there are fewer")
    add("--batch-negatives", **bool_flag(True),
        help="whether the f(φ(I)) of the batch's other images are negatives too")
    add("--beta", type=bounded(float, 0, 0.999), default=0.5,
        help="β: the weight of the past in the memory bank")

    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=bounded(int, 1), default=128,
        help="the global batch size: images per step, of all ranks together")
    add("--epochs", type=bounded(int, 1), default=100,
        help="passes over the training images")
    add("--lr", type=bounded(float, 0, 100), default=0.2,
        help="peak learning rate of SGD with momentum 0.9")
    add("--warmup-steps", type=bounded(int, 0), default=100,
        help="steps in which the learning rate rises from 0")
    add("--tmax-for-cos-decay", type=bounded(int, 1),
        help="epochs until the learning rate reaches 0; defaults to --epochs")
    add("--weight-decay", type=bounded(float, 0, 1), default=5e-4,
        help="weight decay of all weights")
    add("--knn-every", type=bounded(int, 0), default=5,
        help="epochs between measurements of kNN accuracy, 0 for none")
    add("--tensorboard", **bool_flag(False),
        help="whether to write a TensorBoard log too")
    add("--warm-start", **bool_flag(False),
        help="whether to start from --pirl-model-name, or from this experiment's"
             " finished model")
    add("--pirl-model-name", type=non_empty,
        help="with --warm-start: a file of weights, or a name in the weights folder")
    add("--cont-epoch", type=bounded(int, 1), default=1,
        help="with --warm-start: the number of the first epoch")
    # fmt: on
    return parser


def main(argv=None):
    # What is to be done. A resumed run takes its settings from its checkpoint.
    parser = make_parser()
    args = parser.parse_args(argv)
    experiment = Experiment(args, "PIRL checkpoint")
    # A warm start from its own finished model replaces the files of that run.
    from_itself = args.warm_start and not args.pirl_model_name
    checkpoint = experiment.open_checkpoint(args.resume, may_replace=from_itself)
    if checkpoint:
        changeable = CHANGEABLE | {
            "epochs",
            "knn_every",
            "tensorboard",
            "compile",
            "tmax_for_cos_decay",
        }
        args = experiment.restore_settings(parser, argv, args, checkpoint, changeable)
    check_flags(parser, args)
    device = choose_device(args)
    resolve_defaults(args, device)
    join_ranks(device)
    compare_ranks(shared_settings(args))

    # The images, then all that is trained on them.
    images, train_count, checksum = dataset_helpers.load_unlabelled(args, device)
    validate_args(args, train_count)
    trainer = Pretraining(args, device, images, train_count)
    state = TrainingState(device)

    def save():
        experiment.save_checkpoint(args, checksum, trainer, state)

    advice = (
        "lower --lr, raise --temp-parameter or --warmup-steps, or use --precision fp32"
    )
    loop = LoopControl(trainer, state, experiment, save, "epoch", advice)

    # Where the run begins.
    if checkpoint:
        experiment.restore(checkpoint, checksum, trainer, state)
    elif args.warm_start:
        warm_start(trainer, state, experiment)
        # An earlier run of this name may have left a checkpoint. If this run is killed
        # before it writes its own, --resume must not go on with that one.
        loop.checkpoint()
    compare_ranks({}, checksum, state.epoch, state.step)

    # Rank 0 alone measures kNN and writes TensorBoard's log.
    labelled = None
    writer = None
    if RANK == 0:
        if args.knn_every:
            labelled = load_monitor(args, device)
        if args.tensorboard:
            writer = tensorboard_writer(experiment, state.epoch)
    print_summary(trainer, state)

    with loop:
        while state.epoch <= args.epochs:
            epoch = state.epoch
            uniforms = trainer.epoch_uniforms(epoch)
            batches = trainer.epoch_batches(epoch)

            loop.begin_epoch()
            for index in batches[state.step :]:
                totals = trainer.train_step(index, uniforms, epoch, state.step)
                # Saves a checkpoint if one is due; on a signal, the process ends here.
                loop.after_step(totals)
            train_loss, train_accuracy = loop.end_epoch()

            val_loss, val_accuracy = validate(trainer, uniforms, epoch)
            knn_accuracy = None
            if labelled and (epoch % args.knn_every == 0 or epoch == args.epochs):
                knn_accuracy = monitor_accuracy(trainer, labelled)

            metrics = {
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "train_acc": train_accuracy,
                "val_acc": val_accuracy,
                "learning_rate": trainer.optimizer.param_groups[0]["lr"],
                "images_per_second": round(train_count / state.seconds, 1),
                "knn_acc": knn_accuracy,
                "seconds": round(loop.epoch_seconds(), 2),
            }
            state.finish_epoch(metrics)
            experiment.write_history(state.history)
            log_epoch(metrics, args.epochs, writer)
            # A signal that came during validation or kNN ends the process here.
            loop.after_epoch()

        loop.checkpoint()
        export(trainer, state, experiment)
        loop.after_export()


# ---- The loss ------------------------------------------------------------------------
def candidate_logits(u, w, negatives, excluded, temperature):
    """[s(u, w), s(w, m_1), …, s(w, m_C)] / τ: w is to find u among the negatives.

    u, w [B, 128] and negatives [C, 128] are unit vectors; excluded [B, C] is True where
    a vector is no negative of that image: its logit is −∞. Returns [B, 1 + C].
    """
    positive = (u * w).sum(1, keepdim=True)  # [B, 1]
    rivals = (w @ negatives.T).masked_fill(excluded, -math.inf)  # [B, C]
    return torch.cat([positive, rivals], dim=1) / temperature


def modified_nce(logits):
    """−log h(u, w), h being a probability (equation 3). [B, 1 + C] -> [B]."""
    return -F.log_softmax(logits, dim=1)[:, 0]


def nce(logits):
    """−log h(u, w) − Σ_k log(1 − h(w, m_k)) (equation 4). [B, 1 + C] -> [B].

    h(w, m_k) is the probability of column k, with the same denominator as h(u, w).
    Simply written, this is −log_h[:, 0] − log(1 − exp(log_h[:, 1:])).sum(1), but where
    the largest h is near 1, its 1 − h would be lost to rounding.
    """
    log_h = F.log_softmax(logits, dim=1)
    top = logits.argmax(1, keepdim=True)  # the column of the largest h, [B, 1]

    # Of the largest, 1 − h is the probability of all other columns together.
    other_logits = logits.scatter(1, top, -math.inf)
    log_others = other_logits.logsumexp(1, keepdim=True)
    log_not_top = log_others - logits.logsumexp(1, keepdim=True)  # [B, 1]

    # Of the others, h is 1/2 at most. The column of the largest is filled in.
    h = log_h.scatter(1, top, -math.inf).exp()
    log_not_h = torch.log1p(-h).scatter(1, top, log_not_top)
    # Column 0 is the positive, which has no such term.
    return -log_h[:, 0] - log_not_h[:, 1:].sum(1)


def pirl_loss(image_vectors, pretext_vectors, memory, negatives, excluded, args):
    """L = λ · loss(m_I, g(φ(I_t))) + (1 − λ) · loss(m_I, f(φ(I))) (equation 5).

    image_vectors and pretext_vectors [B, 128]: what the heads f and g give; memory [B,
    128]: the images' own rows of the bank; negatives [C, 128] and excluded [B, C]: see
    candidate_logits(). Returns the loss of each image, float32 [B].
    """
    f = F.normalize(image_vectors.float(), dim=1)  # f(φ(I)),   [B, 128]
    g = F.normalize(pretext_vectors.float(), dim=1)  # g(φ(I_t)), [B, 128]

    # Both must find m_I among the negatives. --positive pair lets g find f instead.
    # Stacked, both take one product with the negatives and one backward pass of it.
    target = f if args.positive == "pair" else memory
    logits = candidate_logits(
        torch.cat([target, memory]),
        torch.cat([g, f]),
        negatives,
        torch.cat([excluded, excluded]),
        args.temp_parameter,
    )  # [2·B, 1 + C]

    criterion = nce if args.loss == "nce" else modified_nce
    pretext_term, image_term = criterion(logits).chunk(2)
    return args.loss_weight * pretext_term + (1 - args.loss_weight) * image_term


@torch.no_grad()
def pretext_correct(pretext_vectors, memory, negatives, excluded):
    """Whether m_I is more similar to g(φ(I_t)) than every negative from the bank is.

    The share of such images is the pretext accuracy. A tie does not count, or vectors
    that have collapsed into one would have 100 %. Shapes as in pirl_loss(); bool [B].
    """
    g = F.normalize(pretext_vectors.float(), dim=1)
    similarity = (memory * g).sum(1)
    rivals = (g @ negatives.T).masked_fill(excluded, -math.inf)
    return similarity > rivals.amax(1) + 1e-5  # cosines are rounded by about 1e-7


# ---- Training ------------------------------------------------------------------------
class Pretraining:
    """Network, optimiser and memory bank, and a step of training with them."""

    def __init__(self, args, device, images, train_count):
        """images: uint8 [N, 3, S, S], on the device or on the host.

        The first `train_count` are to train on, the others to validate.
        """
        self.args = args
        self.device = device
        self.images = images
        self.train_count = train_count
        self.steps_per_epoch = math.ceil(train_count / args.batch_size)
        self.negative_count = args.count_negatives
        if self.negative_count is None:
            self.negative_count = min(DEFAULT_NEGATIVES, train_count - 1)

        self.image_view = augmentations.ImageView(args.crop_area, args.colour_strength)
        self.pretext = PRETEXTS[args.pretext](args.colour_strength)
        self.image_view.to(device)
        self.pretext.to(device)

        torch.manual_seed(derived_seed(args.seed, INITIAL_WEIGHTS))
        trunk, dimension = models.make_trunk(args.model_type, args.stem, args.zero_init)
        head_f = models.linear_head(dimension, args.non_linear_head)
        head_g = self.pretext.make_head(dimension, args.non_linear_head)
        self.model = models.PIRL(trunk, head_f, head_g)
        self.model.to(device, memory_format=torch.channels_last)

        self.network = self.model
        if RANKS > 1:
            # DistributedDataParallel warns of the strides of 1 × 1 convolutions in
            # channels-last order. That changes neither the result nor the speed.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            # Each rank normalises its own share of a batch. Before validation, all
            # ranks take over the running statistics of rank 0.
            self.network = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False
            )
        if args.compile:
            self.model.trunk.compile(dynamic=False)
            self.make_views = torch.compile(self.make_views, dynamic=False)

        parameters = self.model.parameters()
        self.optimizer = make_optimizer(parameters, args.lr, args.weight_decay)
        self.scaler = make_scaler(device, args.precision)

        generator = make_generator(device, args.seed, BANK)
        size = (len(images), models.VECTOR_SIZE)
        vectors = torch.randn(size, generator=generator, device=device)
        self.bank = MemoryBank(vectors, train_count, args.beta)

    def state_dict(self):
        return {
            "trunk": self.model.trunk.state_dict(),
            "head_f": self.model.head_f.state_dict(),
            "head_g": self.model.head_g.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bank": self.bank.state_dict(),
        }

    def load_state_dict(self, saved):
        self.model.trunk.load_state_dict(saved["trunk"])
        self.model.head_f.load_state_dict(saved["head_f"])
        self.model.head_g.load_state_dict(saved["head_g"])
        self.optimizer.load_state_dict(saved["optimizer"])
        # A resumed run may have another precision. Only fp16's scaler has a state.
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.bank.load_state_dict(saved["bank"])

    def epoch_batches(self, epoch):
        """The training images in this epoch's order: int64 [B] indices on the host."""
        generator = make_generator("cpu", self.args.seed, ORDER, epoch)
        order = torch.randperm(self.train_count, generator=generator)
        return order.split(self.args.batch_size)

    def epoch_uniforms(self, epoch):
        """A row of random numbers in [0, 1) for the two views of every image.

        float32 [N, U], on the device: U is 96 for the jigsaw. They are a function of
        (seed, epoch, image), whatever else is in the batch.
        """
        generator = make_generator(self.device, self.args.seed, VIEWS, epoch)
        columns = augmentations.IMAGE_VIEW_UNIFORMS + self.pretext.uniforms
        size = (len(self.images), columns)
        return torch.rand(size, generator=generator, device=self.device)

    def train_step(self, index, uniforms, epoch, step):
        """One step of SGD on the images `index` [B], then the bank's update.

        index is on the host, uniforms [N, U] on the device. Nothing here waits for the
        device. Returns [sum of the losses, number of correct pretext answers], float32
        on the device.
        """
        self.model.train()
        lr = learning_rate(self.args, epoch, step, self.steps_per_epoch)
        self.optimizer.param_groups[0]["lr"] = lr

        image_vectors, losses, correct = self.forward_batch(
            index, uniforms, epoch, step
        )

        # DistributedDataParallel takes the mean of the ranks' gradients: with the
        # factor, that is the gradient of the whole batch's mean loss.
        loss = losses.sum() * RANKS / len(index)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        # The norm to clip is that of the gradient itself, not of the scaled one.
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        self.bank.update(to_device(index, self.device), image_vectors)
        return batch_totals(losses, correct)

    def forward_batch(self, index, uniforms, epoch, step):
        """From the images `index` [B], an index on the host, to their losses.

        Returns (f(φ(I)) [B, 128] of the whole batch, detached; losses [b]; correct [b],
        bool). b is this rank's share of the batch, B where there is one rank.
        """
        args = self.args

        # This rank's share. The last batch of an epoch may have fewer images than there
        # are ranks; but all ranks meet in a step, so one without a share takes part
        # with a stand-in, an image that will not count.
        shares = index.tensor_split(RANKS)
        has_share = len(shares[RANK]) > 0
        share = shares[RANK] if has_share else index[:1]

        images = self.take_images(share)
        local_index = to_device(share, self.device)
        batch_index = to_device(index, self.device)
        local_uniforms = uniforms.index_select(0, local_index)
        image_vectors, pretext_vectors = self.run_network(
            images, local_uniforms, full_batch=len(index) == args.batch_size
        )

        # f(φ(I)) of all ranks, in the batch's order.
        counts = [len(part) for part in shares]
        all_vectors = gather_rows(image_vectors.float(), counts)

        # The negatives: from the bank, the same draw on all ranks, and from the batch.
        # Gradients flow into the batch's vectors.
        generator = make_generator(self.device, args.seed, NEGATIVES, epoch, step)
        negatives, excluded = self.bank.draw_negatives(
            local_index, self.negative_count, generator
        )
        memory = self.bank.vectors[local_index]
        correct = pretext_correct(pretext_vectors, memory, negatives, excluded)
        if args.batch_negatives:
            batch_vectors = F.normalize(all_vectors, dim=1)
            own_vector = local_index[:, None] == batch_index  # [b, B]
            negatives = torch.cat([negatives, batch_vectors])
            excluded = torch.cat([excluded, own_vector], dim=1)

        losses = pirl_loss(
            image_vectors, pretext_vectors, memory, negatives, excluded, args
        )
        if not has_share:
            # Times 0 rather than left out: the other ranks wait for the gradients.
            losses = losses * 0
            correct = torch.zeros_like(correct)
        return all_vectors.detach(), losses, correct

    def run_network(self, images, uniforms, full_batch):
        """Two views of each image, and what the heads give for them.

        images uint8 [b, 3, S, S], uniforms [b, U] -> f(φ(I)) and g(φ(I_t)), [b, 128].
        """
        # In eval mode there are no gradients for DistributedDataParallel to average.
        training = self.model.training
        network = self.network if training else self.model

        # Compiled code serves the full batches of training; the few others would each
        # need a compilation of their own.
        compiled = training and full_batch
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            view, pretext_inputs = self.make_views(images, uniforms)
            with autocast(self.device, self.args.precision):
                return network(view, pretext_inputs)

    def take_images(self, index):
        """The images `index` [b], an index on the host, as uint8 on the device."""
        if self.images.device == self.device:
            return self.images.index_select(0, to_device(index, self.device))
        # From pinned memory, the copy to the device runs while the host continues.
        size = (len(index), *self.images.shape[1:])
        batch = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.images, 0, index, out=batch)
        return batch.to(self.device, non_blocking=True)

    def make_views(self, images, uniforms):
        """uint8 [B, 3, S, S] to the views I [B, 3, S, S] and I_t [B·n, 3, P, P]."""
        sizes = [augmentations.IMAGE_VIEW_UNIFORMS, self.pretext.uniforms]
        image_uniforms, pretext_uniforms = uniforms.split(sizes, dim=1)
        images = images.float()
        view = self.image_view(images, image_uniforms)
        return view, self.pretext(images, pretext_uniforms)

    def exported_trunk(self):
        """The trunk with batch-norm statistics of whole, unaugmented images."""
        count = min(self.train_count, STATISTICS_IMAGES)
        images = self.images[:count].to(self.device)
        return evaluation.with_plain_bn_statistics(
            self.model.trunk, images, self.args.batch_size
        )


def batch_totals(losses, correct):
    """[sum of the losses, number of correct answers] of a batch, over all ranks."""
    totals = torch.stack([losses.detach().sum(), correct.sum()])
    if RANKS > 1:
        distributed.all_reduce(totals)
    return totals


def learning_rate(args, epoch, step, steps_per_epoch):
    """Linear warm-up, and half a cosine from --lr to 0.

    It is 0 after --tmax-for-cos-decay epochs and stays there. step: how many steps of
    the epoch are done.
    """
    epochs_done = epoch - 1 + step / steps_per_epoch
    progress = min(epochs_done, args.tmax_for_cos_decay) / args.tmax_for_cos_decay
    cosine = (1 + math.cos(math.pi * progress)) / 2

    # A warm start begins at --cont-epoch, and warms up there.
    run_step = (epoch - args.cont_epoch) * steps_per_epoch + step
    warm_up = min(1.0, (run_step + 1) / max(1, args.warmup_steps))
    return args.lr * warm_up * cosine


@torch.no_grad()
def validate(trainer, uniforms, epoch):
    """(loss, pretext accuracy) of the validation images; (None, None) without any.

    Their rows of the memory bank are updated as those of training images are.
    """
    count = len(trainer.images) - trainer.train_count
    if count == 0:
        return None, None
    if RANKS > 1:
        # Each rank has the running statistics of its own shares: those of rank 0 are
        # used by all.
        for buffer in trainer.model.buffers():
            distributed.broadcast(buffer, 0)

    trainer.model.eval()
    first = trainer.train_count
    index = torch.arange(first, first + count)
    totals = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    with progress_bar(count, f"validation of epoch {epoch}", " images") as bar:
        for number, batch in enumerate(index.split(trainer.args.batch_size)):
            # Steps after the epoch's last, so that their negatives are other draws.
            step = trainer.steps_per_epoch + number
            image_vectors, losses, correct = trainer.forward_batch(
                batch, uniforms, epoch, step
            )
            trainer.bank.update(to_device(batch, trainer.device), image_vectors)
            totals += batch_totals(losses, correct)
            bar.update(len(batch))
    loss, accuracy = (totals / count).tolist()
    return loss, accuracy


def load_monitor(args, device):
    """What the kNN monitor needs: (images, labels, search, query), or None and a note.

    The labelled training images, split as for fine-tuning: kNN among `search`
    classifies `query`. No test image is read.
    """
    folder = args.data_dir / "train"
    try:
        images, labels, *_ = dataset_helpers.load_labelled(
            folder, args.image_size, device
        )
        search, query = dataset_helpers.stratified_split(labels, args.seed, folder)
    except UserError as error:
        print(f"note: kNN accuracy will not be measured: {error}")
        return None
    return images, labels, search, query


def monitor_accuracy(trainer, labelled):
    """kNN accuracy by the trunk as it would be exported now."""
    images, labels, search, query = labelled
    trunk = trainer.exported_trunk()
    features = evaluation.trunk_features(trunk, images, trainer.args.batch_size)
    return evaluation.knn_accuracy(
        features[search], labels[search], features[query], labels[query]
    )


# ---- The beginning and the end of a run ----------------------------------------------
def check_flags(parser, args):
    """Refuse flags that do not go together."""
    first_epoch = args.cont_epoch
    if not args.warm_start and (args.pirl_model_name or first_epoch > 1):
        parser.error("--pirl-model-name and --cont-epoch need --warm-start True")
    if first_epoch > args.epochs:
        last = f"the last epoch, --epochs {args.epochs}"
        parser.error(f"--cont-epoch {first_epoch} is after {last}")


def resolve_defaults(args, device):
    """Fill in the arguments that depend on others or on the machine."""
    args.precision = choose_precision(args, device)
    if args.tmax_for_cos_decay is None:
        args.tmax_for_cos_decay = args.epochs
    if args.compile:
        check_compiler()


def check_compiler():
    """Refuse --compile where torch.compile would fail, in the middle of a step."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if not any(shutil.which(name) for name in compilers):
        raise UserError(
            "--compile needs a C++ compiler, and none was found",
            "install g++, or leave --compile out",
        )
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        raise UserError(
            f"--compile needs Python's headers, and there is no {headers}",
            "install them (python3-dev), or leave --compile out",
        )


def validate_args(args, train_count):
    """Refuse numbers that do not go with the number of images or of ranks."""
    size = args.batch_size
    if train_count < 3:
        raise UserError(
            f"{train_count} training images are too few",
            "add images",
        )
    if RANKS > 1 and (size % RANKS or size < 2 * RANKS):
        # Batch norm would be of no use on a single image.
        raise UserError(
            f"--batch-size {size} does not give each of {RANKS} ranks the same number "
            "of images, two or more",
            "use a multiple",
        )
    if size > train_count:
        raise UserError(
            f"--batch-size {size} is more than the {train_count} training images",
            "choose a smaller one",
        )
    others = train_count - 1
    if args.count_negatives and args.count_negatives > others:
        raise UserError(
            f"--count-negatives {args.count_negatives} is more than the {others} "
            "other images",
            "lower it",
        )


def warm_start(trainer, state, experiment):
    """Start from a file of weights, at --cont-epoch.

    Under the run's own name its record is continued.
    """
    args = trainer.args
    name = args.pirl_model_name or str(experiment.model_file)
    path, weights = read_weights(name, args.weights_dir)
    if not args.pirl_model_name and weights.get("kind") != "PIRL weights":
        raise UserError(
            f"{path} is not a pretrained model, and this run would replace it",
            "choose another --experiment-name",
        )
    modules = dict(trainer.model.named_children())
    load_weights(modules, weights, path)

    state.epoch = args.cont_epoch
    if not args.pirl_model_name:
        history = weights.get("history", [])
        state.history = [row for row in history if row["epoch"] < state.epoch]


def print_summary(trainer, state):
    """Say what is about to be done."""
    args = trainer.args
    where = f"{trainer.device.type}, {args.precision}, seed {args.seed}"
    if RANKS > 1:
        where += f", {RANKS} ranks"
    side = args.image_size
    to_validate = len(trainer.images) - trainer.train_count
    epochs = f"epochs {state.epoch} to {args.epochs}"
    if state.epoch > args.epochs:
        epochs = "all epochs are done"
    negatives = f"{trainer.negative_count} negatives"
    if trainer.negative_count == trainer.train_count - 1:
        negatives += " (all other training images)"

    print(f"{args.experiment_name}: PIRL, {args.pretext}, {args.model_type}, {where}")
    print(
        f"  {trainer.train_count} training images of {side} × {side} pixels,"
        f" {to_validate} for validation"
    )
    print(f"  {trainer.steps_per_epoch} steps of {args.batch_size} per epoch, {epochs}")
    print(f"  {negatives}, loss {args.loss}, --positive {args.positive}", flush=True)
    if args.epochs > args.tmax_for_cos_decay:
        last = args.tmax_for_cos_decay
        print(
            f"note: the learning rate is 0 from the end of epoch {last} on; with "
            f"--tmax-for-cos-decay {args.epochs} it would be a cosine of {args.epochs} "
            "epochs",
            flush=True,
        )


def log_epoch(metrics, epochs, writer):
    """The epoch's line on the screen, and its numbers in TensorBoard's log."""
    formats = {
        "train_loss": "loss {:.4f}",
        "train_acc": "pretext {:.2%}",
        "val_loss": "validation loss {:.4f}",
        "val_acc": "pretext {:.2%}",
        "knn_acc": "kNN {:.1%}",
        "images_per_second": "{:.1f} images/s",
    }
    texts = []
    for name, text in formats.items():
        if metrics[name] is not None:
            texts.append(text.format(metrics[name]))
    print(f"epoch {metrics['epoch']}/{epochs}: {', '.join(texts)}", flush=True)

    if writer is not None:
        for name, value in metrics.items():
            if value is not None:
                writer.add_scalar(name, value, metrics["epoch"])
        writer.flush()


def tensorboard_writer(experiment, epoch):
    """Scalars under the CSV's names. What an interrupted run wrote from `epoch` on is
    hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs a package that is missing",
            "pip install tensorboard",
        ) from None
    return SummaryWriter(experiment.observation("tensorboard"), purge_step=epoch)


def export(trainer, state, experiment):
    """Write <experiment>.pt: the trunk under torchvision's names, and the heads."""
    if RANK > 0:
        return
    parts = {
        "trunk": trainer.exported_trunk(),
        "head_f": trainer.model.head_f,
        "head_g": trainer.model.head_g,
    }
    experiment.export(
        trainer.args,
        parts,
        state,
        images=trainer.train_count,
        pixel_mean=augmentations.PIXEL_MEAN,
        pixel_std=augmentations.PIXEL_STD,
    )
    files = f"{experiment.model_file}, {experiment.checkpoint_file}"
    print(f"wrote {files} and {experiment.history_file}", flush=True)


if __name__ == "__main__":
    run_script(main)
