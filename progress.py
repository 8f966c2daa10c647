"""What happens between two steps: the bar, the clock, checkpoints and signals."""

import io
import math
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import distributed
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from run_helpers import RANK, RANKS, UserError, leave_ranks

# Schedulers such as Slurm send SIGUSR1 or SIGTERM; a lost connection sends SIGHUP.
# Windows lacks some of them.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


class PlainLines(io.TextIOBase):
    """Where tqdm writes if there is no terminal: each state of a bar becomes a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), flush=True)


def progress_bar(total, description, unit, done=0, **options):
    """A tqdm bar on a terminal, elsewhere a plain line a minute; of rank 0 alone."""
    if not sys.stderr.isatty():
        options["file"] = PlainLines()
        options["mininterval"] = 60
        options["maxinterval"] = 60
        options["delay"] = 60
        options["ncols"] = 0
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        disable=RANK > 0,
        leave=False,
        **options,
    )


def in_threads(function, items, description):
    """[function(item) for item in items], by a pool of threads, with a progress bar."""
    bar = progress_bar(len(items), description, " images")

    def task(item):
        result = function(item)
        bar.update()
        return result

    with bar, ThreadPoolExecutor() as pool:
        return list(pool.map(task, items))


class LoopControl:
    """Controls a training loop between its steps.

    Inside its `with` block, SIGTERM, Ctrl-C and their like are only noted, however
    often they come. The loop acts on them at safe points, so none interrupts a step,
    validation or the writing of a file. All ranks stop together.
    """

    def __init__(self, trainer, state, experiment, save, title, advice):
        """save: writes a checkpoint. title: of the bar. advice: if the loss diverges.

        trainer has args, device, model and train_count, the number of images per epoch.
        """
        self.trainer = trainer
        self.state = state
        self.experiment = experiment
        self.save = save
        self.title = title
        self.advice = advice

        self.batch_size = trainer.args.batch_size
        self.steps_per_epoch = math.ceil(trainer.train_count / self.batch_size)
        self.saved_at = time.monotonic()
        self.shown_at = time.monotonic()
        self.epoch_started_at = None
        self.bar = None

        self.signal = 0  # the number of the one that has come
        self.handlers_before = {}

    def __enter__(self):
        # Only a program's main thread may handle signals; a notebook may use others.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.signal(number, self.note_signal)
                self.handlers_before[number] = before
                if number.name == "SIGHUP" and before == signal.SIG_IGN:
                    # So it is under nohup: the run is to outlive its connection.
                    signal.signal(number, signal.SIG_IGN)
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def note_signal(self, number, frame):
        self.signal = number

    def begin_epoch(self):
        """Start the epoch's clock and its bar, or go on with them after a resume."""
        self.epoch_started_at = time.monotonic() - self.state.seconds
        self.bar = progress_bar(
            self.trainer.train_count,
            f"{self.title} {self.state.epoch}",
            " images",
            done=self.images_seen(),
        )

    def after_step(self, totals):
        """Count a step; save a checkpoint if one is due; on a signal, end the process.

        totals [2]: the batch's sum of losses and its number of correct answers.
        """
        seen_before = self.images_seen()
        self.state.step += 1
        self.state.totals += totals
        self.state.seconds = time.monotonic() - self.epoch_started_at
        self.bar.update(self.images_seen() - seen_before)

        last_step = self.state.step == self.steps_per_epoch
        stop, due = self.agree(self.checkpoint_due(last_step), now=last_step)
        if stop or due:
            self.checkpoint()
        if stop:
            place = f"in epoch {self.state.epoch} after step {self.state.step}"
            self.exit(stop, place)

        # Reading numbers back waits for the device, so it is done once a second.
        if RANK == 0 and time.monotonic() - self.shown_at >= 1:
            self.shown_at = time.monotonic()
            self.check_finite()
            loss, accuracy = self.state.averages(self.images_seen())
            text = f"loss {loss:.3f}, accuracy {accuracy:.1%}"
            self.bar.set_postfix_str(text, refresh=False)

    def end_epoch(self):
        """Stop the epoch's clock and its bar. Returns its mean loss and accuracy."""
        self.check_finite()
        averages = self.state.averages(self.trainer.train_count)
        # Both have waited for the device: now the time is that of the whole epoch.
        self.state.seconds = time.monotonic() - self.epoch_started_at
        self.bar.close()
        return averages

    def epoch_seconds(self):
        """Since the epoch began, validation included, breaks for a resume excluded."""
        return time.monotonic() - self.epoch_started_at

    def after_epoch(self):
        """End the process if a signal has come since the last step.

        Call it after state.finish_epoch(), which makes the next epoch the current one.
        """
        stop, _ = self.agree(save_due=False, now=True)
        if stop:
            self.checkpoint()
            self.exit(stop, f"after epoch {self.state.epoch - 1}")

    def after_export(self):
        """End the process with a signal's status if one has come: all work is done."""
        stop, _ = self.agree(save_due=False, now=True)
        if stop:
            leave_ranks()
            sys.exit(128 + stop)

    def checkpoint(self):
        # What is not finite must not overwrite the last good checkpoint.
        self.check_finite()
        self.save()
        self.saved_at = time.monotonic()

    def exit(self, number, place):
        self.bar.close()
        print(f"stopped {place}: --resume True goes on from here", flush=True)
        leave_ranks()
        sys.exit(128 + number)

    def checkpoint_due(self, last_step):
        minutes = self.trainer.args.checkpoint_minutes
        if last_step:
            if not self.experiment.checkpoint_file.exists():
                # The CSV is about to get a row: --resume must find a checkpoint.
                return True
            # At the end of an epoch, unless the last one is less than a minute old.
            minutes = min(minutes, 1)
        return time.monotonic() - self.saved_at >= 60 * minutes

    def agree(self, save_due, now):
        """(number of a signal or 0, whether to save a checkpoint): all ranks' decision.

        A signal to any rank counts, and the wish of rank 0. GPUs decide every 16 steps,
        and where `now` is true.
        """
        if RANKS == 1:
            return self.signal, save_due
        # The hosts of GPUs need not wait for one another after every step. What has
        # come up in between is still there at the next meeting.
        on_gpu = self.trainer.device.type == "cuda"
        if on_gpu and self.state.step % 16 and not now:
            return 0, False
        wishes = torch.tensor([self.signal, save_due and RANK == 0])
        distributed.all_reduce(wishes, distributed.ReduceOp.MAX)
        stop, due = wishes.tolist()
        return stop, bool(due)

    def check_finite(self):
        """End the run if a loss or a weight is not finite. Waits for the device."""
        # One norm of all weights and statistics: it is not finite if one of them is
        # not.
        state_dict = self.trainer.model.state_dict()
        floats = [v for v in state_dict.values() if v.is_floating_point()]
        norms = torch.stack([get_total_norm(floats), self.state.totals.norm()])
        if norms.isfinite().all():
            return
        kept = "there is no checkpoint yet"
        file = self.experiment.checkpoint_file
        if file.exists():
            kept = f"the last checkpoint, {file}, is good"
        raise UserError(
            f"the loss is not finite in {self.title} {self.state.epoch}, step "
            f"{self.state.step} or before",
            f"{self.advice} ({kept})",
        )

    def images_seen(self):
        """In this epoch."""
        return min(self.state.step * self.batch_size, self.trainer.train_count)
