"""A step as one CUDA graph, imitated by fake_graph.py: the bits of the eager step."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from fake_graph import FakeStream, fake_graphs
from records import same

import pirl_stl_train_test
from benchmarks import graph_check
from pirl_stl_train_test import PretrainingTrainer
from runtime import captured
from runtime.captured import EAGER_CALLS, CapturedFunction
from runtime.errors import UserError
from runtime.randomness import make_generator

CPU = torch.device("cpu")
TRAIN_IMAGES = 26  # four batches of 6, and one of 2
VALIDATION_IMAGES = 9
STEPS = 5  # per epoch


@pytest.fixture
def graphs():
    """The graphs that are captured meanwhile."""
    with fake_graphs() as made:
        yield made


@pytest.fixture
def on_cpu(graphs, monkeypatch):
    """Captures on this CPU where --cuda-graph True asks for it; the graphs."""

    def make_captured_update(trainer):
        wanted = trainer.args.cuda_graph
        return captured.CapturedFunction(trainer.update) if wanted else None

    monkeypatch.setattr(
        PretrainingTrainer, "make_captured_update", make_captured_update
    )
    return graphs


# ---- A captured function -------------------------------------------------------------
def test_the_fourth_call_captures_and_each_later_one_replays(graphs):
    """Python runs four times. What comes back is the caller's, whatever comes later."""
    state = torch.zeros(3)
    calls = []

    def accumulate(x, factor):
        calls.append(FakeStream.current)
        state.add_(factor * x)
        return state.sum() + x.max()

    default = FakeStream.current
    function = CapturedFunction(accumulate)
    expected_state = torch.zeros(3)
    results = []
    expected = []
    for number in range(1, 8):
        x = torch.tensor([1.0, 2.0, 3.0]) * number
        factor = torch.tensor(0.5 + number)
        results.append(function(x, factor))
        expected_state += factor * x
        expected.append(expected_state.sum() + x.max())
        assert state.equal(expected_state), number
    assert same(results, expected)
    assert len(calls) == EAGER_CALLS + 1
    (graph,) = graphs
    assert graph.replays == 7 - EAGER_CALLS

    # All of it on one stream, in the order of the caller's.
    assert set(calls) == {function.stream}
    assert function.stream is not default
    assert function.stream.waited_for == [default] * EAGER_CALLS
    assert default.waited_for == [function.stream] * EAGER_CALLS


def test_what_was_given_is_not_kept(graphs):
    """The caller may change or free its tensors."""
    function = CapturedFunction(lambda x: 2 * x)
    given = torch.ones(2)
    for _ in range(EAGER_CALLS + 1):
        function(given)
    assert function(torch.full((2,), 3.0)).tolist() == [6, 6]
    assert given.tolist() == [1, 1]
    with pytest.raises(ValueError, match="zip"):
        function(given, given)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (lambda x: x * x.sum().item(), "the host would wait"),
        (lambda x: x[x.isfinite().nonzero()[0]], "the host would wait"),
        (
            lambda x: x + torch.rand(2, generator=make_generator("cpu", 0)),
            "a generator",
        ),
        (lambda x: x * torch.ones(2, device="meta"), "two devices"),
    ],
    ids=["item", "nonzero", "generator", "another device"],
)
def test_what_cannot_be_captured_is_one_line(graphs, function, cause):
    """The cause, not the failed end of the capture."""
    captured_function = CapturedFunction(function)
    captured_function.eager_calls_left = 0
    with pytest.raises(UserError) as failure:
        captured_function(torch.ones(2))
    text = str(failure.value)
    assert text.endswith(": use --cuda-graph False")
    assert cause in text
    assert "\n" not in text


# ---- Where a step is captured --------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "flags", "ranks", "is_captured"),
    [
        ("cuda", "--cuda-graph", 1, True),
        ("cuda:1", "--cuda-graph True --precision fp16", 1, True),
        ("cuda", "", 1, False),
        ("cuda", "--cuda-graph False", 1, False),
        ("cuda", "--cuda-graph --compile", 1, False),
        ("cuda", "--cuda-graph", 2, False),
        ("cpu", "--cuda-graph", 1, False),
    ],
)
def test_where_a_step_is_captured(
    graphs, monkeypatch, device, flags, ranks, is_captured
):
    """On one GPU, where it is asked for, without --compile: not yet by default."""
    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", ranks)
    args = pirl_stl_train_test.make_parser().parse_args(flags.split())
    update = object()
    trainer = SimpleNamespace(args=args, device=torch.device(device), update=update)
    made = PretrainingTrainer.make_captured_update(trainer)
    if is_captured:
        assert type(made) is CapturedFunction
        assert made.function is update
    else:
        assert made is None


# ---- The training step ---------------------------------------------------------------
def make_trainer(*flags, seed=0):
    # fmt: off
    common = [
        "--device", "cpu", "--image-size", 36, "--batch-size", 6, "--epochs", 3,
        "--warmup-steps", 4, "--lr", 0.3, "--zero-init", "False", "--seed", seed,
    ]
    # fmt: on
    parser = pirl_stl_train_test.make_parser()
    args = parser.parse_args([str(flag) for flag in (*common, *flags)])
    pirl_stl_train_test.resolve_defaults(args, CPU)
    generator = torch.Generator().manual_seed(1)
    size = (TRAIN_IMAGES + VALIDATION_IMAGES, 3, 36, 36)
    images = torch.randint(0, 256, size, generator=generator).byte()
    return PretrainingTrainer(args, CPU, images, TRAIN_IMAGES)


def checkpoint_of(trainer):
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(trainer, first=0, last=2 * STEPS):
    """The steps from `first` to before `last` of two epochs, and what comes between.

    Yields what each returns and where it leads.
    """
    for epoch in (1, 2):
        uniforms = trainer.epoch_uniforms(epoch)
        batches = trainer.epoch_batches(epoch)
        assert len(batches) == STEPS
        for step, index in enumerate(batches):
            if first <= (epoch - 1) * STEPS + step < last:
                totals = trainer.train_step(index, uniforms, epoch, step)
                rate = trainer.optimizer.param_groups[0]["lr"]
                yield {"totals": totals, "rate": rate, **copies_of_state(trainer)}
        if epoch * STEPS <= last:
            loss, accuracy = pirl_stl_train_test.validate(trainer, uniforms, epoch)
            trunk = trainer.exported_trunk().state_dict()
            yield {
                "loss": loss,
                "accuracy": accuracy,
                **trunk,
                **copies_of_state(trainer),
            }


def copies_of_state(trainer):
    """What a step changes."""
    states = trainer.optimizer.state.values()
    return {
        "model": [tensor.clone() for tensor in trainer.model.state_dict().values()],
        "momentum": [state["momentum_buffer"].clone() for state in states],
        "bank": trainer.bank.vectors.clone(),
        "scaler": trainer.scaler.state_dict(),
    }


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--loss nce --positive pair --batch-negatives False --pretext rotation",
        "--pretext jigsaw-rotation --non-linear-head --count-negatives 20",
        "--precision bf16 --beta 0",
        "--precision fp16 --weight-decay 0.01",
    ],
)
def test_captured_steps_have_the_bits_of_eager_ones(on_cpu, flags):
    """Two epochs with a partial batch, validation and an export in each."""
    eager = make_trainer(*flags.split())
    captured_trainer = make_trainer(*flags.split(), "--cuda-graph")
    if "fp16" in flags:
        # The first steps overflow and are skipped, the later ones are not: the graph
        # has both.
        for trainer in (eager, captured_trainer):
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    first = copies_of_state(eager)
    pairs = list(zip(train(eager), train(captured_trainer), strict=True))
    for number, (one, two) in enumerate(pairs):
        for name in one:
            assert same(one[name], two[name]), (number, name)
    rates = [one["rate"] for one, _ in pairs if "rate" in one]
    assert all(type(rate) is float for rate in rates), "a checkpoint holds a number"
    assert len(set(rates)) == 2 * STEPS

    (graph,) = on_cpu
    assert graph.replays == 2 * 4 - EAGER_CALLS, "full batches of training alone"
    assert not same(copies_of_state(eager)["momentum"], first["momentum"])
    if "fp16" in flags:
        halvings = math.log2(2.0**22 / captured_trainer.scaler.get_scale())
        assert EAGER_CALLS + 1 < halvings < 2 * STEPS, "some captured steps are skipped"


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "captured"])
def test_a_checkpoint_of_captured_steps_continues_exactly(on_cpu, begun):
    """Also in a trainer that has captured another run's steps: those are forgotten."""
    whole = list(train(make_trainer()))
    stopped = make_trainer("--cuda-graph")
    steps = list(train(stopped, last=4))
    assert same(steps, whole[:4])

    resumed = make_trainer("--cuda-graph")
    if begun:
        list(train(resumed, last=4))
    resumed.load_state_dict(checkpoint_of(stopped))
    rest = list(train(resumed, first=4))
    assert same(rest, whole[4:])
    assert len(on_cpu) == 2 + begun


def test_a_failed_capture_ends_the_run_with_one_line(
    call, tiny, on_cpu, monkeypatch, tmp_path
):
    update = PretrainingTrainer.update

    def update_that_reads(self, *arguments):
        totals = update(self, *arguments)
        assert totals[0] > 0
        return totals

    monkeypatch.setattr(PretrainingTrainer, "update", update_that_reads)
    outcome = call("pirl_stl_train_test", *tiny, "--cuda-graph")
    assert outcome.is_one_line_error("captured", "use --cuda-graph False")
    assert not list((tmp_path / "weights").glob("*.pt"))


# ---- The check for a card ------------------------------------------------------------
@pytest.mark.slow
def test_the_check_for_a_card(on_cpu, monkeypatch, capsys):
    """A trial of benchmarks/graph_check.py: on the CPU, by the imitation."""
    monkeypatch.setattr(graph_check.throughput, "IMAGES", 64)
    monkeypatch.setattr(graph_check, "IMAGES", 64)
    monkeypatch.setattr(graph_check, "SHAPES", graph_check.SHAPES[:2])
    small = "--device cpu --image-size 36 --batch-size 16 --rounds 2 --steps 2"
    monkeypatch.setattr(graph_check, "STEPS", 10)
    graph_check.main(["bits", *small.split()])
    out = capsys.readouterr().out
    assert out.count("equal bits over the steps 0 to 9") == 6
    assert out.count("equal bits over the steps 5 to 9") == 1

    graph_check.main(["speed", *small.split()])
    lines = capsys.readouterr().out.splitlines()
    results = [line for line in lines if "images/s: eager" in line]
    assert len(results) == len(graph_check.SHAPES)
    assert all("a launch alone" in line for line in results)

    # What is not captured or not equal is a failure, and does not end the others.
    update = PretrainingTrainer.update

    def update_with_a_plain_number(self, lr, *batch):
        return update(self, self.optimizer.param_groups[0]["lr"], *batch)

    monkeypatch.setattr(PretrainingTrainer, "update", update_with_a_plain_number)
    with pytest.raises(UserError, match="parts went wrong"):
        graph_check.main(["bits", *small.split()])
    assert "DIFFERENT after step 4" in capsys.readouterr().out
