"""Captured steps on a GPU: the same bits, no waits, the speed and the memory.

   python -m benchmarks.graph_check bits      # 20 steps, captured beside eager
   python -m benchmarks.graph_check speed     # images per second, in turns

Flags of pirl_stl_train_test.py may follow; they hold for every part. Each line comes
at once, and a part that fails does not end the others. Deterministic parts must say
"equal bits". Where eager steps differ from eager ones, a difference between
captured and eager ones means nothing.
"""

import gc
import io
import sys
import time
import traceback
from statistics import median

import torch

from benchmarks import throughput
from runtime.captured import EAGER_CALLS
from runtime.errors import UserError, first_line
from runtime.script import run_script

STARTED = time.monotonic()
EAGER = ("--cuda-graph", "False")
CAPTURED = ("--cuda-graph", "True")
EXACT = ("--deterministic", "True", "--warmup-steps", "0")
STEPS = 20
IMAGES = 1000  # of the parts that compare bits


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parts = {"bits": bits, "speed": speed}
    if not argv or argv[0] not in parts:
        raise UserError("say what to check", "bits or speed, then flags of training")
    flags = argv[1:]
    args = throughput.parse_args(flags)
    say(f"torch {torch.__version__}, {args.device}")
    failures = parts[argv[0]](flags)
    if failures:
        raise UserError(f"{failures} parts went wrong", "see their lines above")


def say(text):
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def attempt(title, part, *arguments):
    """Print a part's result, or where it failed. Returns how many failures, 0 or 1."""
    failed = 0
    try:
        say(f"{title}: {part(*arguments)}")
    except Exception as error:
        failed = 1
        say(f"{title}: FAILED: {first_line(error)}")
        traceback.print_exc(file=sys.stdout)
    # The next part needs the memory.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failed


def make_trainer(flags, count):
    args = throughput.parse_args(flags)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    trainer = throughput.make_trainer(args, count)
    if args.images_on == "host":
        trainer.images = trainer.images.cpu()
    return trainer


# ---- Bits ----------------------------------------------------------------------------
def bits(flags):
    failures = attempt("waits, bf16", waits, [*EXACT, "--precision", "bf16", *flags])
    for precision in ("fp32", "bf16", "fp16"):
        exact = [*EXACT, "--precision", precision, *flags]
        failures += attempt(
            f"{precision}, deterministic", must_be_equal, exact, EAGER, CAPTURED
        )
    exact = [*EXACT, "--precision", "bf16", *flags]
    failures += attempt("resumed, deterministic", resumed, exact)
    nce = [*exact, "--loss", "nce", "--images-on", "host"]
    failures += attempt("nce, images on the host", must_be_equal, nce, EAGER, CAPTURED)
    # As in use: cuDNN's fastest algorithms need not be deterministic.
    fast = ["--precision", "bf16", "--warmup-steps", "0", *flags]
    failures += attempt("bf16, eager beside eager", compare, fast, EAGER, EAGER)
    failures += attempt("bf16, captured beside eager", compare, fast, EAGER, CAPTURED)
    return failures


def waits(flags):
    """A step that fails where the host waits, which a capture does not permit."""
    trainer = make_trainer([*flags, *EAGER], IMAGES)
    uniforms = trainer.epoch_uniforms(1)
    trainer.train_step(batch_of(trainer, 0), uniforms, 1, 0)
    if not torch.cuda.is_available():
        return "not looked for without a GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(batch_of(trainer, 1), uniforms, 1, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def must_be_equal(flags, one_way, other_way):
    result = compare(flags, one_way, other_way)
    if "equal bits" not in result:
        raise AssertionError(result)
    return result


def compare(flags, one_way, other_way):
    """Two trainers that begin alike, with different flags, make the same steps."""
    one = make_trainer([*flags, *one_way], IMAGES)
    other = make_trainer([*flags, *other_way], IMAGES)
    other.images = one.images
    result = in_lockstep(one, other, range(STEPS))
    for trainer in (one, other):
        update = trainer.captured_update
        if trainer.args.cuda_graph and (update is None or update.graph is None):
            raise AssertionError(f"nothing was captured; {result}")
    return result


def resumed(flags):
    """Half of the steps; then a checkpoint of them continues beside the run itself."""
    whole = make_trainer([*flags, *CAPTURED], IMAGES)
    uniforms = whole.epoch_uniforms(1)
    for step in range(STEPS // 2):
        whole.train_step(batch_of(whole, step), uniforms, 1, step)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)

    other = make_trainer([*flags, *CAPTURED], IMAGES)
    other.images = whole.images
    other.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    result = in_lockstep(whole, other, range(STEPS // 2, STEPS))
    if "equal bits" not in result:
        raise AssertionError(result)
    return result


def batch_of(trainer, step):
    """A full batch; every eighth has fewer images, as the last one of an epoch."""
    size = trainer.args.batch_size
    if step % 8 == 7:
        size -= 5
    generator = torch.Generator().manual_seed(step)
    order = torch.randperm(trainer.train_count, generator=generator)[:size]
    # Pinned, as in training.
    return order.pin_memory() if trainer.device.type == "cuda" else order


def in_lockstep(one, other, steps):
    """Both make these steps: "equal bits", or the step after which they differ."""
    uniforms = one.epoch_uniforms(1)
    for step in steps:
        index = batch_of(one, step)
        totals = one.train_step(index, uniforms, 1, step)
        same_totals = totals.equal(other.train_step(index, uniforms, 1, step))
        if step % 8 == 7:
            # What runs between two epochs.
            one.exported_trunk()
            other.exported_trunk()
        gaps = differences(one, other)
        if gaps or not same_totals:
            largest = max(gaps, default=0.0)
            return (
                f"DIFFERENT after step {step}: {len(gaps)} tensors, by up to "
                f"{largest:.1e}; same totals: {same_totals}"
            )
    if not all(tensor.isfinite().all() for tensor in state_of(one)):
        return "NOT FINITE"
    return f"equal bits over the steps {steps[0]} to {steps[-1]}"


def differences(one, other):
    """The largest difference within each tensor that differs."""
    gaps = []
    for a, b in zip(state_of(one), state_of(other), strict=True):
        if not a.equal(b):
            gaps.append((a.double() - b.double()).abs().max().item())
    return gaps


def state_of(trainer):
    """All tensors that a step changes."""
    momentum = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
    return [*trainer.model.state_dict().values(), *momentum, trainer.bank.vectors]


# ---- Speed ---------------------------------------------------------------------------
SHAPES = [  # images per batch, side in pixels, precision
    (128, 96, "bf16"),
    (128, 64, "bf16"),
    (256, 96, "bf16"),
    (256, 64, "bf16"),
    (128, 96, "fp32"),
    (512, 96, "bf16"),
]


def speed(flags):
    failures = 0
    ways = {"eager": EAGER, "captured": CAPTURED}
    for size, side, precision in SHAPES:
        title = f"batch {size}, {side} px, {precision}"
        # fmt: off
        shape = [
            "--batch-size", str(size), "--image-size", str(side),
            "--precision", precision, *flags,
        ]
        # fmt: on
        failures += attempt(title, speeds, shape, ways)
    if torch.cuda.is_available():
        ways["compiled"] = ("--compile", "True")
        shape = ["--precision", "bf16", *flags]
        failures += attempt("with --compile, batch 128", speeds, shape, ways)
    return failures


def speeds(flags, ways):
    """Images per second of each way, in turns; what each holds; a launch alone."""
    torch.compiler.reset()
    args = throughput.parse_args(flags)
    steps = args.steps or 48
    contestants = {}
    for way, extra in ways.items():
        held_before = memory_held()
        count = max(throughput.IMAGES, args.batch_size)
        trainer = make_trainer([*flags, *extra], count)
        step = throughput.training_step(trainer, args.batch_size)
        started = time.monotonic()
        for _ in range(EAGER_CALLS + 2):
            step()
        throughput.synchronize()
        seconds = time.monotonic() - started
        held = memory_held() - held_before
        say(f"    {way}: ready after {seconds:.1f} s, holds {held:.2f} GiB")
        contestants[way] = (trainer, step)

    found = {way: [] for way in ways}
    for number in range(args.rounds):
        for way, (_, step) in contestants.items():
            seconds, _ = throughput.timed(step, steps)
            found[way].append(args.batch_size * steps / seconds)
        latest = ", ".join(f"{way} {rates[-1]:.0f}" for way, rates in found.items())
        say(f"    round {number + 1}: {latest} images/s")

    texts = []
    for way, rates in found.items():
        text = f"{way} {median(rates):.0f} ({min(rates):.0f} … {max(rates):.0f})"
        update = contestants[way][0].captured_update
        if update is not None:
            text += (
                f", a launch alone {launch_milliseconds(update.graph, steps):.2f} ms"
            )
        texts.append(text)
    return "images/s: " + "; ".join(texts)


def memory_held():
    """GiB that torch holds once it has given back what is not in use."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**30


def launch_milliseconds(graph, count):
    """Time of a replay, many in a row: what the device itself needs.

    If it is far below 1000 · batch size / (images per second), the host is the limit.
    """
    seconds, _ = throughput.timed(graph.replay, count)
    return 1000 * seconds / count


if __name__ == "__main__":
    run_script(main)
