"""Pretrain a ResNet without labels by PIRL (Misra & van der Maaten, arXiv:1912.01991).

python pirl_stl_train_test.py --only-train True --experiment-name exp
"""

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn

import augmentations
import dataset_helpers
import evaluation
import models
from losses import LOSSES, pirl_loss, pretext_correct
from memory_bank import MemoryBank
from pretexts import PRETEXTS
from runtime.arguments import (
    Parser,
    add_file_arguments,
    add_machine_arguments,
    add_run_arguments,
    add_trunk_arguments,
    bool_flag,
    bounded,
    non_empty,
)
from runtime.bars import progress_bar
from runtime.captured import CapturedFunction
from runtime.devices import (
    autocast,
    check_compiler,
    choose_device,
    choose_precision,
    make_optimizer,
    make_scaler,
    optimizer_step,
    restore_optimizer,
)
from runtime.errors import UserError
from runtime.experiment import CHANGEABLE, Experiment, TrainingState, shared_settings
from runtime.files import weights_checksum
from runtime.loop import LoopControl
from runtime.randomness import (
    BANK,
    INITIAL_WEIGHTS,
    NEGATIVES,
    ORDER,
    VIEWS,
    derived_seed,
    make_generator,
)
from runtime.ranks import RANK, WORLD_SIZE, compare_ranks, gather_rows, init_distributed
from runtime.script import run_script
from runtime.weights import load_weights, read_weights

DEFAULT_NEGATIVES = 6400
# The first gradients have norms above 10, with --loss nce even more. Clipping makes the
# first steps of both losses about equally long.
MAX_GRADIENT_NORM = 2.0
# What a resumed run may change, besides the settings that both scripts allow.
CHANGEABLE_HERE = {
    "epochs",
    "knn_every",
    "tensorboard",
    "compile",
    "cuda_graph",
    "tmax_for_cos_decay",
}
ADVICE_IF_DIVERGED = (
    "lower --lr, raise --temp-parameter or --warmup-steps, or use --precision fp32"
)


def make_parser():
    parser = Parser(
        "Pretrain a ResNet without labels by PIRL, on the images in\n"
        "<data-dir>/unlabelled/.",
        example="python pirl_stl_train_test.py --only-train True --experiment-name exp",
    )
    add_run_arguments(
        parser,
        name="e1_pirl_",
        epochs_help="passes over the training images",
        batch_help="images per step, of all GPUs together",
        lr=0.2,
        lr_help="peak learning rate of SGD with momentum 0.9",
    )
    # fmt: off
    add = parser.add_argument_group("images").add_argument
    add("--only-train", **bool_flag(False),
        help="train on all unlabelled images instead of 70 %%, without validation")
    add("--crop-area", type=bounded(float, 0.01, 1), default=augmentations.CROP_AREA[0],
        metavar="X",
        help="smallest crop of the image view, as a fraction of the area, 0.01 to 1")
    add("--colour-strength", type=bounded(float, 0, 2), metavar="X",
        default=augmentations.COLOUR_STRENGTH,
        help="strength of the colour jitter, 0 (none) to 2")
    add("--images-on", choices=["auto", "device", "host"], default="auto",
        help="where the images are kept; auto: on the device if they fit there")

    add_trunk_arguments(parser, [*models.TRUNKS], from_weights=False)

    add = parser.add_argument_group("pretext task and loss").add_argument
    add("--pretext", choices=[*PRETEXTS], default="jigsaw",
        help="pretext task")
    add("--loss", choices=[*LOSSES], default="modified-nce",
        help="modified-nce: the first term of the paper's equation 4; nce: all of it")
    add("--positive", choices=["bank", "pair"], default="bank",
        help="target of g(φ(I_t)), the embedding of the pretext view: the image's"
             " memory m_I (bank), or f(φ(I)) of the same step (pair)")
    add("--loss-weight", type=bounded(float, 0, 1), default=0.5, metavar="X",
        help="λ: weight of the pretext term, 0 to 1")
    add("--temp-parameter", type=bounded(float, 0.01, 100), default=0.07, metavar="X",
        help="τ: temperature, 0.01 to 100")
    add("--count-negatives", type=bounded(int, 1), metavar="N",
        help=f"K: negatives from the bank; by default {DEFAULT_NEGATIVES},"
             " or all other images if there are fewer")
    add("--batch-negatives", **bool_flag(True),
        help="also use the new f(φ(I)) of the batch's other images as negatives")
    add("--beta", type=bounded(float, 0, 0.999), default=0.5, metavar="X",
        help="β: weight of the past in the memory bank, 0 to 0.999")
    add("--non-linear-head", **bool_flag(False),
        help="add a ReLU and another linear layer to each head")

    add = parser.add_argument_group("learning rate and monitoring").add_argument
    add("--warmup-steps", type=bounded(int, 0), default=100, metavar="N",
        help="steps in which the learning rate rises from 0")
    add("--tmax-for-cos-decay", type=bounded(int, 1), metavar="N",
        help="epochs until the learning rate reaches 0; by default --epochs")
    add("--knn-every", type=bounded(int, 0), default=5, metavar="N",
        help="epochs between measurements of kNN accuracy, 0 for none")
    add("--tensorboard", **bool_flag(False),
        help="write a TensorBoard log, too")

    add = add_machine_arguments(parser).add_argument
    add("--compile", **bool_flag(False),
        help="compile the trunk and the augmentations with torch.compile")
    add("--cuda-graph", **bool_flag(False),
        help="launch each step as one CUDA graph, on one GPU without --compile;"
             " not yet tried on a GPU")

    add_file_arguments(parser)

    add = parser.add_argument_group("start from other weights").add_argument
    add("--pirl-model-name", type=non_empty, metavar="NAME",
        help="file of weights to start from, or a name in the weights folder")
    add("--warm-start", **bool_flag(False),
        help="start from --pirl-model-name; without it, from this experiment's own"
             " finished model, whose files are then overwritten")
    add("--cont-epoch", type=bounded(int, 1), default=1, metavar="N",
        help="with a warm start: number of the first epoch")
    # fmt: on
    return parser


def main(argv=None):
    # A resumed run takes its settings from its checkpoint.
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.pirl_model_name:
        args.warm_start = True  # a file of weights alone is a warm start, too
    experiment = Experiment(args, "PIRL checkpoint")
    # A warm start from its own finished model replaces the files of that run.
    from_itself = args.warm_start and not args.pirl_model_name
    checkpoint = experiment.open_checkpoint(args.resume, may_replace=from_itself)
    if checkpoint:
        changeable = CHANGEABLE | CHANGEABLE_HERE
        args = experiment.restore_settings(parser, argv, args, checkpoint, changeable)
    check_before_loading(parser, args)
    device = choose_device(args)
    resolve_defaults(args, device)
    init_distributed(device)
    compare_ranks(shared_settings(args))

    # The images, then all that is trained on them.
    images, train_count, fingerprint = dataset_helpers.load_unlabelled(
        args, device, bytes_beside_pixels(args)
    )
    check_after_loading(args, train_count)
    trainer = PretrainingTrainer(args, device, images, train_count)
    state = TrainingState(device)

    # The weights that the run begins with.
    if checkpoint:
        experiment.restore(checkpoint, fingerprint, trainer, state)
        keep_begun_epochs(args, state)
    elif args.warm_start:
        warm_start(trainer, state, experiment)
    checksum = weights_checksum(trainer.model)
    compare_ranks({}, fingerprint, state.epoch, state.step, checksum)

    def save():
        experiment.save_checkpoint(args, fingerprint, trainer, state)

    loop = LoopControl(
        state,
        trainer.model,
        images_per_epoch=train_count,
        batch_size=args.batch_size,
        save=save,
        checkpoint_file=experiment.checkpoint_file,
        checkpoint_minutes=args.checkpoint_minutes,
        title="epoch",
        advice=ADVICE_IF_DIVERGED,
    )
    if args.warm_start and not checkpoint:
        # --warm-start on the run's own name leaves its earlier checkpoint there. If
        # this run is killed before it writes its own, --resume must not continue with
        # the old one.
        loop.checkpoint()

    # Rank 0 alone measures kNN and writes TensorBoard's log.
    monitor = None
    writer = None
    if RANK == 0:
        if args.knn_every:
            monitor = evaluation.make_monitor(args, device)
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
                # Adds 1 to state.step, and saves a checkpoint if one is due; on a
                # signal, the process ends here.
                loop.after_step(totals)
            train_loss, train_accuracy = loop.end_epoch()

            val_loss, val_accuracy = validate(trainer, uniforms, epoch)
            knn_accuracy = None
            if monitor and (epoch % args.knn_every == 0 or epoch == args.epochs):
                knn_accuracy = monitor.accuracy(trainer.exported_trunk())

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
        experiment.write_history(state.history)  # also of a copied checkpoint
        export(trainer, state, experiment)
        # A signal that came during the export ends the process here.
        loop.after_export()


# ---- Training ------------------------------------------------------------------------
class Batch(NamedTuple):
    """What a step computes with, all of it on the device.

    A batch has B images. Each of several ranks computes a share of b of them; with one
    rank, b = B.
    """

    index: torch.Tensor  # int64 [B], the images of the whole batch
    share: torch.Tensor  # int64 [b], those of this rank
    images: torch.Tensor  # uint8 [b, 3, S, S], their pixels
    uniforms: torch.Tensor  # float32 [b, U], the random numbers of their views
    drawn: torch.Tensor  # int64 [K + 1], rows of the bank: the negatives


class PretrainingTrainer:
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
        models.speed_up_small_maps(trunk)
        head_f = models.linear_head(dimension, args.non_linear_head)
        head_g = self.pretext.make_head(dimension, args.non_linear_head)
        self.model = models.PIRL(trunk, head_f, head_g)
        self.model.to(device, memory_format=torch.channels_last)

        # self.model has the weights; training calls self.parallel_model, which also
        # averages the gradients of several ranks.
        self.parallel_model = self.model
        if WORLD_SIZE > 1:
            # DistributedDataParallel warns of the strides of 1 × 1 convolutions in
            # channels-last order. That changes neither the result nor the speed.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            # Batch norm uses the statistics of each rank's own share (there is no
            # SyncBatchNorm), so its buffers are not broadcast in every step: validate()
            # does that, and checkpoints have those of rank 0.
            self.parallel_model = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False
            )
        self.autocast = autocast(device, args.precision)
        if args.compile:
            self.model.trunk.compile(dynamic=False)
            self.make_views = torch.compile(self.make_views, dynamic=False)

        parameters = self.model.parameters()
        self.optimizer = make_optimizer(parameters, args.lr, args.weight_decay)
        self.scaler = make_scaler(device, args.precision)
        self.captured_update = self.make_captured_update()

        generator = make_generator(device, args.seed, BANK)
        size = (len(images), models.EMBEDDING_SIZE)
        vectors = torch.randn(size, generator=generator, device=device)
        self.bank = MemoryBank(vectors, train_count, args.beta)

    def make_captured_update(self):
        """update() as one CUDA graph, or None where a step runs eagerly."""
        wanted = self.args.cuda_graph and not self.args.compile
        if self.device.type == "cuda" and WORLD_SIZE == 1 and wanted:
            return CapturedFunction(self.update)
        return None

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
        restore_optimizer(self.optimizer, self.scaler, saved)
        self.bank.load_state_dict(saved["bank"])
        # The momentum is in new tensors now. A step that was captured before would use
        # the old ones.
        self.captured_update = self.make_captured_update()

    # ---- What an epoch needs ---------------------------------------------------------
    def epoch_batches(self, epoch):
        """The training images in this epoch's order: int64 [B] indices on the host."""
        generator = make_generator("cpu", self.args.seed, ORDER, epoch)
        order = torch.randperm(self.train_count, generator=generator)
        if self.device.type == "cuda":
            # From pinned memory, a copy to the device runs while the host continues.
            order = order.pin_memory()
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

    # ---- A step ----------------------------------------------------------------------
    def train_step(self, index, uniforms, epoch, step):
        """One step of SGD on the images `index` [B], then the bank's update.

        index is on the host, uniforms [N, U] on the device. Nothing here waits for the
        device. Returns [sum of the losses, number of correct pretext answers], float32
        on the device.
        """
        self.model.train()
        batch = self.load_batch(index, uniforms, epoch, step)
        lr = learning_rate(self.args, epoch, step, self.steps_per_epoch)
        # update() gets it as a tensor, which the fused optimiser reads from the memory
        # of the device. In a captured step, a number would stay what it was when the
        # step was captured.
        lr_tensor = torch.full((), lr, dtype=torch.float32, device=self.device)

        if self.captured_update and len(index) == self.args.batch_size:
            totals = self.captured_update(lr_tensor, *batch)
        else:
            totals = self.update(lr_tensor, *batch)

        # update() left the tensor there; checkpoints and the CSV need a number.
        self.optimizer.param_groups[0]["lr"] = lr
        return totals

    def load_batch(self, index, uniforms, epoch, step):
        """index int64 [B], on the host -> a Batch, on the device.

        Copies from the host and the draw of negatives are here, outside update(): if
        that is captured as a CUDA graph, it would repeat the same copies and draw.
        """
        # This rank's share. The last batch of an epoch may have fewer images than there
        # are ranks, but every rank must take part in the exchange of gradients. So a
        # rank without a share computes the batch's first image all the same;
        # gather_rows() drops its embedding, and forward_batch() its loss.
        share = index.tensor_split(WORLD_SIZE)[RANK]
        if len(share) == 0:
            share = index[:1]

        index_on_device = index.to(self.device, non_blocking=True)
        share_on_device = share.to(self.device, non_blocking=True)
        if self.images.device == self.device:
            images = self.images.index_select(0, share_on_device)
        else:
            # The images are on the host: gathered into pinned memory, then copied.
            size = (len(share), *self.images.shape[1:])
            pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            torch.index_select(self.images, 0, share, out=pinned)
            images = pinned.to(self.device, non_blocking=True)

        # The same negatives on all ranks.
        generator = make_generator(self.device, self.args.seed, NEGATIVES, epoch, step)
        drawn = self.bank.draw(self.negative_count, generator)
        return Batch(
            index=index_on_device,
            share=share_on_device,
            images=images,
            uniforms=uniforms.index_select(0, share_on_device),
            drawn=drawn,
        )

    def update(self, lr, *batch):
        """Forward, backward, the optimiser's step and the bank's update.

        lr: the learning rate, a tensor []. batch: the tensors of a Batch, as a flat
        list, which CapturedFunction can copy.

        On a GPU this may be captured: its kernels are then launched again and again
        without this code. So everything that differs between two steps is a tensor
        among the arguments, and what is changed is changed in place.
        """
        batch = Batch(*batch)
        all_embeddings, loss, totals = self.forward_batch(batch)

        self.optimizer.param_groups[0]["lr"] = lr
        optimizer_step(loss, self.optimizer, self.scaler, MAX_GRADIENT_NORM)

        self.bank.update(batch.index, all_embeddings)
        return totals

    def forward_batch(self, batch):
        """From a Batch to its loss, in training and in validation.

        Returns (f(φ(I)) [B, 128] of the whole batch, detached; the loss to minimise, a
        scalar; [sum of the losses, number of correct answers] of the whole batch).
        """
        args = self.args
        batch_size = len(batch.index)

        # Validation has no gradients that several ranks would have to average.
        training = self.model.training
        model = self.parallel_model if training else self.model

        # With --compile, compiled code serves the full batches of training. The few
        # other batches would each need a compilation of their own.
        compiled = training and batch_size == args.batch_size
        stance = "default" if compiled else "force_eager"

        # Two views of each image, through the network.
        with torch.compiler.set_stance(stance):
            view, pretext_inputs = self.make_views(batch.images, batch.uniforms)
            with self.autocast:
                image_embeddings, pretext_embeddings = model(view, pretext_inputs)

        # f(φ(I)) of all ranks, in the batch's order.
        counts = [len(share) for share in batch.index.tensor_split(WORLD_SIZE)]
        all_embeddings = image_embeddings.float()  # [b, 128]
        if WORLD_SIZE > 1:
            all_embeddings = gather_rows(all_embeddings, counts)  # [B, 128]

        # Negatives from the bank: the same draw on all ranks. Pretext accuracy counts
        # these alone, whatever --batch-negatives says.
        negatives, mask = self.bank.negatives(batch.drawn, batch.share)
        memory = self.bank.vectors[batch.share]
        correct = pretext_correct(pretext_embeddings, memory, negatives, mask)

        # The loss also has the new embeddings of the batch as negatives; gradients flow
        # into them.
        if args.batch_negatives:
            batch_vectors = F.normalize(all_embeddings, dim=1)
            is_own = batch.share[:, None] == batch.index  # [b, B]
            negatives = torch.cat([negatives, batch_vectors])
            mask = torch.cat([mask, is_own], dim=1)

        losses = pirl_loss(
            image_embeddings, pretext_embeddings, memory, negatives, mask, args
        )
        if counts[RANK] == 0:
            # A rank without a share has computed another rank's image (load_batch()).
            # Its loss is multiplied by 0, so that there are gradients to exchange.
            losses = losses * 0
            correct = torch.zeros_like(correct)

        # DistributedDataParallel divides the sum of the ranks' gradients by WORLD_SIZE;
        # wanted is the gradient of the mean loss of all B images.
        loss = losses.sum() * WORLD_SIZE / batch_size
        totals = torch.stack([losses.detach().sum(), correct.sum()])
        if WORLD_SIZE > 1:
            distributed.all_reduce(totals)
        return all_embeddings.detach(), loss, totals

    def make_views(self, images, uniforms):
        """uint8 [B, 3, S, S] to the views I [B, 3, S, S] and I_t [B·n, 3, P, P]."""
        sizes = [augmentations.IMAGE_VIEW_UNIFORMS, self.pretext.uniforms]
        image_uniforms, pretext_uniforms = uniforms.split(sizes, dim=1)
        images = images.float()
        view = self.image_view(images, image_uniforms)
        return view, self.pretext(images, pretext_uniforms)

    # ---- The result ------------------------------------------------------------------
    def exported_trunk(self):
        """The trunk with batch-norm statistics of whole, unaugmented images."""
        count = min(self.train_count, evaluation.STATISTICS_IMAGES)
        images = self.images[:count].to(self.device)
        return evaluation.with_plain_bn_statistics(
            self.model.trunk, images, self.args.batch_size
        )


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
    if WORLD_SIZE > 1:
        # Each rank has the running statistics of its own shares: those of rank 0 are
        # used by all.
        for buffer in trainer.model.buffers():
            distributed.broadcast(buffer, 0)

    trainer.model.eval()
    first = trainer.train_count
    index = torch.arange(first, first + count)
    totals = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    with progress_bar(count, f"validation of epoch {epoch}", " images") as bar:
        for number, rows in enumerate(index.split(trainer.args.batch_size)):
            # The seed of a draw of negatives contains the number of the step. Training
            # uses the numbers below steps_per_epoch, validation those from there on.
            step = trainer.steps_per_epoch + number
            batch = trainer.load_batch(rows, uniforms, epoch, step)
            all_embeddings, _, batch_totals = trainer.forward_batch(batch)
            trainer.bank.update(batch.index, all_embeddings)
            totals += batch_totals
            bar.update(len(rows))
    loss, accuracy = (totals / count).tolist()
    return loss, accuracy


# ---- The beginning of a run ----------------------------------------------------------
def check_before_loading(parser, args):
    """Refuse flags that do not go together, before images are read."""
    first_epoch = args.cont_epoch
    if first_epoch > 1 and not args.warm_start:
        parser.error("--cont-epoch needs a warm start, for example --pirl-model-name")
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


def bytes_beside_pixels(args):
    """Bytes per image that the device needs besides its pixels.

    A row of the memory bank in float32, and the random numbers of its views for two
    epochs, of which one is drawn while the other is still there.
    """
    uniforms = augmentations.IMAGE_VIEW_UNIFORMS + PRETEXTS[args.pretext].uniforms
    return 4 * (models.EMBEDDING_SIZE + 2 * uniforms)


def check_after_loading(args, train_count):
    """Refuse numbers that do not go with the number of images or of ranks."""
    size = args.batch_size
    if train_count < 3:
        raise UserError(
            f"{train_count} training images are too few",
            "add images",
        )
    if WORLD_SIZE > 1 and (size % WORLD_SIZE or size < 2 * WORLD_SIZE):
        # Batch norm would be of no use on a single image.
        raise UserError(
            f"--batch-size {size} does not give each of {WORLD_SIZE} ranks the same "
            "number of images, two or more",
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
    steps = math.ceil(train_count / size) * (args.epochs - args.cont_epoch + 1)
    if args.warmup_steps > steps:
        print(
            f"note: the warm-up of {args.warmup_steps} steps is longer than the run, "
            f"{steps} steps, so the learning rate does not reach --lr: lower "
            "--warmup-steps"
        )


def keep_begun_epochs(args, state):
    """If a resumed run is beyond --epochs already, raise --epochs to where it is."""
    begun = state.epoch if state.step > 0 else state.epoch - 1
    if begun > args.epochs:
        print(f"note: epoch {begun} has begun already, so --epochs is {begun}")
        args.epochs = begun


def warm_start(trainer, state, experiment):
    """Start from a file of weights, at --cont-epoch.

    Without --pirl-model-name, that file is this experiment's own finished model, and
    the rows of its CSV before --cont-epoch are kept.
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
    """Print the settings of the run."""
    args = trainer.args
    where = f"{trainer.device.type}, {args.precision}, seed {args.seed}"
    if WORLD_SIZE > 1:
        where += f", {WORLD_SIZE} ranks"
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
    if args.cuda_graph and trainer.captured_update is None:
        print(
            "note: --cuda-graph True has no effect here: it needs one GPU, without "
            "--compile",
            flush=True,
        )
    if args.epochs > args.tmax_for_cos_decay:
        last = args.tmax_for_cos_decay
        print(
            f"note: the learning rate is 0 from the end of epoch {last} on; with "
            f"--tmax-for-cos-decay {args.epochs} it would be a cosine of {args.epochs} "
            "epochs",
            flush=True,
        )


# ---- The record and the result -------------------------------------------------------
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
        return  # the statistics of the trunk take a while
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
