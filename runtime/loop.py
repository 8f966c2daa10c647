"""What happens between two steps: the bar, the clock, checkpoints and signals."""

import contextlib
import math
import signal
import sys
import threading
import time

import torch
from torch import distributed
from torch.nn.utils import get_total_norm

from runtime.bars import progress_bar
from runtime.errors import UserError
from runtime.ranks import RANK, WORLD_SIZE, cleanup_distributed

# Schedulers such as Slurm send SIGUSR1 or SIGTERM; a lost connection sends SIGHUP.
# Windows lacks some of them.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]
# How often the ranks of GPUs ask one another whether to stop or to save.
STEPS_BETWEEN_SYNCS = 16
# After the last step of an epoch, a checkpoint is written unless the previous one is
# younger than this.
END_OF_EPOCH_MINUTES = 1


class Signals:
    """Inside its `with` block, signals are noted instead of ending the process."""

    def __init__(self):
        self.received = 0  # the number of the last one, 0 for none
        self.handlers_before = {}

    def __enter__(self):
        # Only a program's main thread may handle signals; a notebook may use others.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.signal(number, self.note)
                self.handlers_before[number] = before
                if number.name == "SIGHUP" and before == signal.SIG_IGN:
                    # nohup ignores it, so that a run outlives its connection.
                    signal.signal(number, signal.SIG_IGN)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        first = not self.received
        self.received = number
        if first:
            # The signal may have come in the middle of another print().
            with contextlib.suppress(RuntimeError, OSError):
                name = signal.Signals(number).name
                print(
                    f"\n{name} received: the run will stop after the current step or "
                    "validation; --resume True continues it",
                    flush=True,
                )


class EpochBar:
    """The bar of the epoch under way, and its clock, which a resumed run continues.

    state.seconds is the time that the training steps took, without validation. The
    clock also runs during validation, after the bar is closed.
    """

    def __init__(self, title, state, images_per_epoch, batch_size):
        self.state = state
        self.images_per_epoch = images_per_epoch
        self.batch_size = batch_size
        self.started_at = time.monotonic() - state.seconds
        self.shown_at = time.monotonic()
        self.bar = progress_bar(
            images_per_epoch, title, " images", done=self.images_seen()
        )

    def images_seen(self):
        """In this epoch; the last batch may be smaller."""
        return min(self.state.step * self.batch_size, self.images_per_epoch)

    def seconds(self):
        """Since the epoch began, breaks before a resume excluded."""
        return time.monotonic() - self.started_at

    def update(self):
        """Move the bar to the images seen."""
        self.bar.update(self.images_seen() - self.bar.n)

    def is_due(self):
        """Whether to show the loss: once a second, since that waits for the device."""
        if time.monotonic() - self.shown_at < 1:
            return False
        self.shown_at = time.monotonic()
        return True

    def show(self, loss, accuracy):
        text = f"loss {loss:.3f}, accuracy {accuracy:.1%}"
        self.bar.set_postfix_str(text, refresh=False)

    def close(self):
        self.bar.close()


class LoopControl:
    """Controls a training loop between its steps.

    Inside its `with` block, SIGTERM, Ctrl-C and their like are only noted, however
    often they come. The loop acts on them at safe points, so none interrupts a step,
    validation or the writing of a file. All ranks stop together.
    """

    def __init__(
        self,
        state,
        model,
        images_per_epoch,
        batch_size,
        save,
        checkpoint_file,
        checkpoint_minutes,
        title,
        advice,
    ):
        """model: what must stay finite. save: writes a checkpoint, checkpoint_file.

        title: of the bar, before the epoch's number. advice: if the loss diverges.
        """
        self.state = state
        self.model = model
        self.images_per_epoch = images_per_epoch
        self.batch_size = batch_size
        self.steps_per_epoch = math.ceil(images_per_epoch / batch_size)
        self.save = save
        self.checkpoint_file = checkpoint_file
        self.checkpoint_minutes = checkpoint_minutes
        self.title = title
        self.advice = advice

        self.signals = Signals()
        self.saved_at = time.monotonic()
        self.bar = None  # an EpochBar, within an epoch

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        self.signals.__exit__(*error)

    # ---- In the order in which a loop calls them -------------------------------------
    def begin_epoch(self):
        """Start the epoch's bar and clock, or continue them after a resume."""
        title = f"{self.title} {self.state.epoch}"
        self.bar = EpochBar(title, self.state, self.images_per_epoch, self.batch_size)

    def after_step(self, totals):
        """Count a step; save a checkpoint if one is due; on a signal, end the process.

        totals [2]: the batch's sum of losses and its number of correct answers.
        """
        self.state.step += 1
        self.state.totals += totals
        self.state.seconds = self.bar.seconds()
        self.bar.update()

        # After the last step of an epoch, the ranks always ask one another (agree()): a
        # signal must end the run before validation, which may take longer than a
        # scheduler waits.
        is_last_step = self.state.step == self.steps_per_epoch
        save_due = self.checkpoint_due(is_last_step)
        signal_number, save_now = self.agree(save_due, now=is_last_step)
        if signal_number or save_now:
            self.checkpoint()
        if signal_number:
            place = f"in epoch {self.state.epoch} after step {self.state.step}"
            self.exit(signal_number, place)

        if RANK == 0 and self.bar.is_due():
            self.check_finite()
            self.bar.show(*self.state.averages(self.bar.images_seen()))

    def end_epoch(self):
        """Stop the epoch's clock and its bar. Returns its mean loss and accuracy."""
        self.check_finite()
        averages = self.state.averages(self.images_per_epoch)
        # Both have waited for the device, so the clock includes the last steps.
        self.state.seconds = self.bar.seconds()
        self.bar.close()
        return averages

    def epoch_seconds(self):
        """Since the epoch began, validation included, breaks for a resume excluded."""
        return self.bar.seconds()

    def after_epoch(self):
        """End the process if a signal has come since the last step.

        Call it after state.finish_epoch(), which makes the next epoch the current one.
        """
        signal_number, _ = self.agree(save_due=False, now=True)
        if signal_number:
            self.checkpoint()
            self.exit(signal_number, f"after epoch {self.state.epoch - 1}")

    def after_export(self):
        """End the process with a signal's status if one has come: all work is done."""
        signal_number, _ = self.agree(save_due=False, now=True)
        if signal_number:
            cleanup_distributed()
            sys.exit(128 + signal_number)

    # ---- Checkpoints and the end -----------------------------------------------------
    def checkpoint(self):
        # A diverged run must not overwrite the last good checkpoint.
        self.check_finite()
        self.save()
        self.saved_at = time.monotonic()

    def exit(self, signal_number, place):
        self.bar.close()
        print(f"stopped {place}: continue with --resume True", flush=True)
        cleanup_distributed()
        sys.exit(128 + signal_number)

    def checkpoint_due(self, is_last_step):
        minutes = self.checkpoint_minutes
        if is_last_step:
            if not self.checkpoint_file.exists():
                # The CSV is about to get a row, and then a new run refuses the name
                # (Experiment.open_checkpoint()). So --resume must find a checkpoint.
                return True
            minutes = min(minutes, END_OF_EPOCH_MINUTES)
        return time.monotonic() - self.saved_at >= 60 * minutes

    def agree(self, save_due, now):
        """(number of a signal or 0, whether to save a checkpoint): all ranks' decision.

        All ranks must call this at the same steps. A signal to any of them counts, but
        only rank 0's `save_due`. Asking makes the hosts wait for each other. So ranks
        on GPUs ask every 16 steps, and when `now` is true; in between, a signal or a
        checkpoint that is due waits for the next sync.
        """
        if WORLD_SIZE == 1:
            return self.signals.received, save_due
        sync_due = now or self.state.step % STEPS_BETWEEN_SYNCS == 0
        if self.state.device.type == "cuda" and not sync_due:
            return 0, False
        wishes = torch.tensor([self.signals.received, save_due and RANK == 0])
        distributed.all_reduce(wishes, distributed.ReduceOp.MAX)
        signal_number, save_now = wishes.tolist()
        return signal_number, bool(save_now)

    def check_finite(self):
        """End the run if a loss or a weight is not finite. Waits for the device."""
        # One norm of all weights and batch-norm statistics: it is not finite if one of
        # them is not.
        tensors = self.model.state_dict().values()
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        norms = torch.stack([get_total_norm(floats), self.state.totals.norm()])
        if norms.isfinite().all():
            return
        kept = "there is no checkpoint yet"
        if self.checkpoint_file.exists():
            kept = f"the last checkpoint, {self.checkpoint_file}, is good"
        raise UserError(
            f"the loss is not finite in {self.title} {self.state.epoch}, step "
            f"{self.state.step} or before",
            f"{self.advice} ({kept})",
        )
