"""Errors, arguments and their types, the launcher's variables, and other systems."""

import argparse
import builtins
import datetime
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS
from torch import distributed

import extract_features
import pictures
import pirl_stl_train_test
import stl10_data_load
import train_stl_after_ssl
from runtime import ranks, script
from runtime.arguments import (
    Parser,
    bool_flag,
    bounded,
    experiment_name,
    file_path,
    non_empty,
)
from runtime.errors import UserError
from runtime.ranks import compare_ranks
from runtime.script import run_script


# ---- The end of a script -------------------------------------------------------------
def status_of(error):
    """The exit status of a script whose main() raises the error."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code


def test_what_the_user_can_solve_is_one_line(capsys):
    assert status_of(UserError("the file a\nb is wrong", "use another")) == 1
    assert capsys.readouterr().err == "error: the file a b is wrong: use another\n"


def test_interrupted_before_training(capsys):
    assert status_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_an_error_of_the_system(capsys):
    assert status_of(OSError(28, "No space left on device", "exp.pt")) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: exp.pt: No space left on device: solve this")
    assert len(err.splitlines()) == 1


def test_full_memory_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    allocator = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
    assert status_of(torch.OutOfMemoryError("CUDA out of memory")) == 1
    assert status_of(RuntimeError(allocator)) == 1
    assert status_of(MemoryError()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "memory is full" in line
        assert "--batch-size" in line
    with pytest.raises(RuntimeError, match="a bug"):
        status_of(RuntimeError("a bug"))


def test_a_reader_that_has_seen_enough():
    """As `| head` does: one line, and no complaint of the interpreter at its end."""
    code = (
        "from run_helpers import run_script\n"
        "def main():\n"
        "    for i in range(10**5):\n"
        "        print('line', i)\n"
        "run_script(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    assert err.startswith("error: the program that read the output has ended")
    assert len(err.splitlines()) == 1


def test_standard_output_on_a_full_disk(monkeypatch, capsys):
    """What could not be written cannot be flushed either: one line all the same."""

    class FullDisk:
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert status_of(OSError(28, "No space left on device", "out.txt")) == 1
    sys.stdout.flush()  # as the interpreter does at its end
    err = capsys.readouterr().err
    assert err.startswith("error: out.txt: No space left on device: solve this")
    assert len(err.splitlines()) == 1


def test_every_rank_says_its_own_line(capsys, monkeypatch):
    monkeypatch.setattr(ranks, "RANK", 3)
    monkeypatch.setattr(ranks, "WORLD_SIZE", 4)
    parser = Parser("A script.")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--no-such-flag"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error (rank 3): unrecognized arguments: --no-such-flag: see")
    assert len(err.splitlines()) == 1
    line = script.error_line("a\nb")
    assert line == "error (rank 3): a b"


# ---- Arguments -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("yes", True),
        ("1", True),
        ("FALSE", False),
        ("no", False),
        ("0", False),
    ],
)
def test_booleans_mean_what_they_say(text, value):
    parser = pirl_stl_train_test.make_parser()
    assert parser.parse_args(["--only-train", text]).only_train is value
    assert parser.parse_args(["--only-train", "--resume"]).only_train is True
    assert parser.parse_args([]).only_train is False


def test_help_has_every_default_and_usage_errors_are_one_line(capsys):
    parser = Parser("A script.")
    parser.add_argument("--count", type=bounded(int, 1), default=7, help="how many")
    parser.add_argument("--all", **bool_flag(True), help="whether all")
    text = " ".join(parser.format_help().split())
    assert "--count COUNT how many (default: 7)" in text
    assert "--all [True|False] whether all (default: True)" in text

    for arguments in (["--coun", "1"], ["--count", "0"], ["--all", "maybe"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.endswith("--help\n")
        assert len(err.splitlines()) == 1


def test_numbers_within_bounds():
    assert bounded(int, 1, 5)("5") == 5
    assert bounded(float, 0, 1)("1e-2") == 0.01
    for text in ("0", "6"):
        with pytest.raises(
            argparse.ArgumentTypeError, match="at least 1 and at most 5"
        ):
            bounded(int, 1, 5)(text)
    for text in ("nan", "-inf", "1.1"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} must be"):
            bounded(float, 0, 1)(text)


@pytest.mark.parametrize("text", ["1e2", "1.5", "x", ""])
def test_what_is_no_whole_number(text):
    expected = f"^{re.escape(repr(text))} is not a whole number$"
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        bounded(int, 1)(text)


def test_what_is_no_number():
    with pytest.raises(argparse.ArgumentTypeError, match=r"^'x' is not a number$"):
        bounded(float, 1)("x")


def test_paths_expand_the_home_folder(monkeypatch):
    """The shell leaves the ~ of --flag=~/folder as it is."""
    monkeypatch.setenv("HOME", "/somewhere")
    assert file_path("~/folder") == Path("/somewhere/folder")
    assert file_path("a/~b") == Path("a/~b")
    args = pirl_stl_train_test.make_parser().parse_args(["--data-dir=~/images"])
    assert args.data_dir == Path("/somewhere/images")


@pytest.mark.parametrize("kind", [file_path, non_empty, experiment_name])
def test_an_empty_text_is_refused(kind):
    """It is most often a shell variable that is not set."""
    with pytest.raises(argparse.ArgumentTypeError):
        kind("")


def test_names_of_experiments():
    for name in ("e1_resnet18_", "lr=0.1, seed 3", "größe"):
        assert experiment_name(name) == name
    for name in ("../x", "a/b", ".x", "-x", "x\ny", " "):
        with pytest.raises(argparse.ArgumentTypeError, match="plain file name"):
            experiment_name(name)


# ---- Ranks ---------------------------------------------------------------------------
LAUNCHER = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
ON_A_NODE = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}


def imported_again(monkeypatch, environment):
    """run_helpers.py of a process that is started with these of the variables."""
    for name in LAUNCHER | ON_A_NODE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = ROOT / "run_helpers.py"
    specification = importlib.util.spec_from_file_location("imported_again", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def ranks_with(monkeypatch, environment):
    module = imported_again(monkeypatch, environment)
    return module.RANK, module.WORLD_SIZE


def test_the_place_on_a_node_is_the_launcher_s(monkeypatch):
    module = imported_again(monkeypatch, LAUNCHER | ON_A_NODE)
    assert (module.LOCAL_RANK, module.LOCAL_WORLD_SIZE) == (3, 4)
    module = imported_again(monkeypatch, ON_A_NODE)
    assert (module.LOCAL_RANK, module.LOCAL_WORLD_SIZE) == (0, 1)


def test_a_launcher_sets_all_of_its_variables(monkeypatch):
    """Clusters leave some of them behind, which start nothing."""
    assert ranks_with(monkeypatch, LAUNCHER) == (1, 2)
    assert ranks_with(monkeypatch, {}) == (0, 1)
    assert ranks_with(monkeypatch, {"WORLD_SIZE": "2"}) == (0, 1)
    for missing in LAUNCHER:
        some = dict(LAUNCHER)
        del some[missing]
        assert ranks_with(monkeypatch, some) == (0, 1), missing


def test_rows_are_gathered_in_the_batch_s_order(monkeypatch):
    """Ranks with two rows, one and none; the last one's row is a stand-in.

    all_reduce() would sum what the ranks give it: here the test does. Gradients flow
    back to the rows.
    """
    rows = [
        torch.tensor([[1.0, 2], [3, 4]], requires_grad=True),
        torch.tensor([[5.0, 6]], requires_grad=True),
        torch.ones(1, 2, requires_grad=True),
    ]
    monkeypatch.setattr(run_helpers, "all_reduce", lambda tensor: tensor)
    monkeypatch.setattr(ranks, "WORLD_SIZE", 3)
    given = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        given.append(ranks.gather_rows(rows[rank], [2, 1, 0]))
    assert sum(given).tolist() == [[1, 2], [3, 4], [5, 6]]
    sum(given).sum().backward()
    gradients = [part.grad.tolist() for part in rows]
    assert gradients == [[[1, 1], [1, 1]], [[1, 1]], [[0, 0]]]

    monkeypatch.setattr(ranks, "WORLD_SIZE", 1)
    assert ranks.gather_rows(rows[0], [2]) is rows[0]


def test_how_ranks_meet(monkeypatch):
    met = []

    def init_process_group(backend, device_id=None):
        met.append((backend, device_id))

    monkeypatch.setattr(distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(ranks, "WORLD_SIZE", 2)
    card = torch.device("cuda", 1)
    ranks.init_distributed(card)
    ranks.init_distributed(torch.device("cpu"))
    assert met == [("cpu:gloo,cuda:nccl", card), ("gloo", None)]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        distributed.DistBackendError("NCCL error: remote process exited"),
    ],
    ids=["gloo", "nccl"],
)
def test_a_lost_connection_ends_in_one_line_at_once(monkeypatch, capsys, error):
    ended = []

    def end_at_once(status):
        ended.append(status)
        raise SystemExit(status)

    with pytest.raises(type(error)):
        status_of(error)  # of a single process, it is a bug
    monkeypatch.setattr(ranks, "WORLD_SIZE", 2)
    monkeypatch.setattr(os, "_exit", end_at_once)
    assert status_of(error) == 1
    assert ended == [1], "the interpreter's own end may wait"
    err = capsys.readouterr().err
    assert err.startswith("error (rank 0): another rank of this job has ended")
    assert len(err.splitlines()) == 1


def test_rank_0_alone_prints(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "RANK", 1)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is put back at the end
    called = []

    def main():
        print("a line")
        called.append(1)

    run_script(main)
    assert called == [1]
    assert capsys.readouterr().out == ""


def test_ranks_must_have_the_same_flags_and_files(monkeypatch):
    ours = {"lr": 0.1, "batch_size": 16}
    others = {"lr": 0.1, "batch_size": 32}
    everyone = []

    def all_gather_object(gathered, own):
        gathered[:] = [own, *everyone]

    monkeypatch.setattr(run_helpers.distributed, "all_gather_object", all_gather_object)
    compare_ranks(ours, 1)  # one rank, nothing to compare
    monkeypatch.setattr(ranks, "WORLD_SIZE", 2)

    everyone[:] = [(ours, (1, 2))]
    compare_ranks(ours, 1, 2)
    everyone[:] = [(others, (1, 2))]
    with pytest.raises(UserError, match=r"different flags \(--batch-size\): start all"):
        compare_ranks(ours, 1, 2)
    everyone[:] = [(ours, (1, 3))]
    with pytest.raises(UserError, match=r"different files: give a --data-dir"):
        compare_ranks(ours, 1, 2)


# ---- Other systems -------------------------------------------------------------------
def scripts():
    files = sorted(ROOT.glob("*.py"))
    return [file.stem for file in files if "__main__" in file.read_text()]


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 14, 0)])
def test_a_python_that_is_too_old_or_too_new_is_one_line(monkeypatch, version):
    """datetime.UTC, ExceptionGroup and tomllib are among what Python 3.11 brought."""
    ends = {}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", version)
        patch.setitem(sys.modules, "tomllib", None)
        patch.delattr(datetime, "UTC")
        patch.delattr(builtins, "ExceptionGroup")
        # Nothing of the project counts as imported already.
        for file in ROOT.glob("*.py"):
            patch.delitem(sys.modules, file.stem, raising=False)

        for script in scripts():
            try:
                importlib.import_module(script)
            except SystemExit as end:
                ends[script] = end.code
    assert ends.keys() == set(scripts()) == set(SCRIPTS)
    for line in ends.values():
        assert line.startswith("error: this is Python"), line


@pytest.mark.slow
def test_a_terminal_that_lacks_our_signs():
    environment = dict(os.environ)
    environment["PYTHONIOENCODING"] = "ascii"
    command = [sys.executable, ROOT / "pirl_stl_train_test.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u03c4: the temperature" in done.stdout


def test_what_only_unix_has_is_not_used():
    """fcntl, resource and os.sched_getaffinity do not exist on Windows.

    The last does not on macOS either.
    """
    names = [
        "import fcntl",
        "import resource",
        "sched_getaffinity",
        "os.fork",
        "SIGALRM",
    ]
    pattern = "|".join(re.escape(name) for name in names)
    for file in ROOT.glob("*.py"):
        assert not re.search(pattern, file.read_text()), file.name


# ---- The flags of all ranks ----------------------------------------------------------
def compare_with(monkeypatch, other_settings, other_files):
    """compare_ranks() of rank 0, with lr 0.2 and file 7, beside another rank."""

    def all_gather_object(everyone, mine):
        everyone[0] = mine
        everyone[1] = (other_settings, other_files)

    monkeypatch.setattr(ranks, "WORLD_SIZE", 2)
    gather = "all_gather_object"
    monkeypatch.setattr(run_helpers.distributed, gather, all_gather_object)
    settings = {"lr": 0.2, "batch_size": 128, "model_type": "res18"}
    ranks.compare_ranks(settings, 7)


def test_ranks_with_the_same_flags_and_files_may_begin(monkeypatch):
    same = {"lr": 0.2, "batch_size": 128, "model_type": "res18"}
    compare_with(monkeypatch, same, (7,))


def test_one_process_compares_nothing(monkeypatch):
    monkeypatch.delattr(run_helpers.distributed, "all_gather_object")
    ranks.compare_ranks({"lr": 0.2}, 7)


def test_the_flags_that_differ_between_ranks_are_named(monkeypatch):
    other = {"lr": 0.01, "batch_size": 64, "model_type": "res18"}
    line = r"the ranks have different flags \(--lr, --batch-size\): start all"
    with pytest.raises(UserError, match=line):
        compare_with(monkeypatch, other, (7,))
    # Other flags may be why other files were read: they come first.
    with pytest.raises(UserError, match=line):
        compare_with(monkeypatch, other, (8,))


def test_ranks_that_have_read_different_files(monkeypatch):
    same = {"lr": 0.2, "batch_size": 128, "model_type": "res18"}
    with pytest.raises(UserError, match="different files: give a --data-dir"):
        compare_with(monkeypatch, same, (8,))


def test_flags_are_compared_before_the_ranks_make_one_network(call, tiny, monkeypatch):
    """With other --model-types, torch would say so first, by a traceback."""

    def differ(settings, *files):
        assert settings["model_type"] == "res18"
        for place in ("data_dir", "weights_dir", "device", "resume"):
            assert place not in settings, "it may differ between nodes"
        assert "images_on" in settings, "ranks would wait for one another for ever"
        raise UserError("the ranks have different flags", "start all with the same")

    def too_late(*arguments):
        raise AssertionError("the network comes after the comparison")

    monkeypatch.setattr(pirl_stl_train_test, "compare_ranks", differ)
    monkeypatch.setattr(pirl_stl_train_test, "Pretraining", too_late)
    outcome = call("pirl_stl_train_test", *tiny)
    assert outcome.is_one_line_error("different flags")


# ---- Whole scripts -------------------------------------------------------------------
def parse_extraction(arguments):
    return extract_features.parse_args(["--model=m", "--images=i", *arguments])


def parse_pretraining(arguments):
    return pirl_stl_train_test.make_parser().parse_args(arguments)


def parse_fine_tuning(arguments):
    return train_stl_after_ssl.make_parser().parse_args(arguments)


@pytest.mark.parametrize(
    ("parse", "flag"),
    [
        (stl10_data_load.parse_args, "--raw-dir"),
        (stl10_data_load.parse_args, "--data-dir"),
        (parse_pretraining, "--data-dir"),
        (parse_pretraining, "--weights-dir"),
        (parse_pretraining, "--observations-dir"),
        (parse_fine_tuning, "--data-dir"),
        (parse_fine_tuning, "--weights-dir"),
        (parse_fine_tuning, "--observations-dir"),
        (parse_fine_tuning, "--neighbours"),
        (parse_extraction, "--images"),
        (parse_extraction, "--out"),
        (parse_extraction, "--weights-dir"),
        (pictures.parse_args, "--data-dir"),
        (pictures.parse_args, "--out"),
    ],
)
def test_every_path_flag_expands_the_home_folder(monkeypatch, parse, flag):
    """--weights-dir=~/x must not make a folder named ~."""
    monkeypatch.setenv("HOME", "/somewhere")
    args = parse([f"{flag}=~/x.npz"])
    name = flag.removeprefix("--").replace("-", "_")
    assert getattr(args, name) == Path("/somewhere/x.npz")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_without_docstrings(call, monkeypatch, name):
    """python -OO leaves them out."""
    monkeypatch.setattr(SCRIPTS[name], "__doc__", None)
    outcome = call(name, "--help")
    assert outcome.status == 0, outcome.err
    assert "--data-dir" in outcome.out or "--images" in outcome.out


@pytest.mark.slow
def test_scripts_without_docstrings():
    """As above, by python -OO itself. It compiles all of torch first."""
    code = (
        "import sys\n"
        "sys.path.insert(0, 'tests')\n"
        "from conftest import SCRIPTS\n"
        "for name, script in SCRIPTS.items():\n"
        "    try:\n"
        "        script.main(['--help'])\n"
        "    except SystemExit as end:\n"
        "        print('status', name, end.code)\n"
    )
    command = [sys.executable, "-OO", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in SCRIPTS:
        assert f"status {name} 0\n" in done.stdout


@pytest.mark.slow
def test_nothing_follows_the_last_line_where_the_reader_has_ended():
    """Ctrl-C ends `| tee` too. What is not written yet cannot be, and that is all."""
    code = (
        "import sys\n"
        "from run_helpers import run_script\n"
        "def main():\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print('note: not written yet')\n"
        "    raise KeyboardInterrupt\n"
        "run_script(main)\n"
    )
    environment = dict(os.environ)
    environment.pop("PYTHONUNBUFFERED", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stdin.write("the reader has ended\n")
    process.stdin.close()
    err = process.stderr.read()
    assert process.wait(60) == 130
    assert err.startswith("error: interrupted")
    assert len(err.splitlines()) == 1, err


# ---- The defaults --------------------------------------------------------------------
# docs/recipe.md says why they are what they are; the README's figures rest on them.
IN_BOTH_SCRIPTS = {
    "data_dir": Path("stl10_data"),
    "weights_dir": Path("weights"),
    "observations_dir": Path("observations_dir"),
    "model_type": "res18",
    "zero_init": True,
    "image_size": 96,
    "batch_size": 128,
    "epochs": 100,
    "weight_decay": 5e-4,
    "pirl_model_name": None,
    "resume": False,
    "checkpoint_minutes": 10.0,
    "seed": 0,
    "device": "auto",
    "precision": "auto",
    "deterministic": False,
}
OF_PRETRAINING = {
    "experiment_name": "e1_resnet18_",
    "only_train": False,
    "crop_area": 0.2,
    "colour_strength": 0.5,
    "images_on": "auto",
    "stem": "imagenet",
    "non_linear_head": False,
    "compile": False,
    "pretext": "jigsaw",
    "loss": "modified-nce",
    "positive": "bank",
    "loss_weight": 0.5,
    "temp_parameter": 0.07,
    "count_negatives": None,
    "batch_negatives": True,
    "beta": 0.5,
    "lr": 0.2,
    "warmup_steps": 100,
    "tmax_for_cos_decay": None,
    "knn_every": 5,
    "tensorboard": False,
    "warm_start": False,
    "cont_epoch": 1,
}
OF_FINE_TUNING = {
    "experiment_name": "e1_pirl_sup_",
    "stem": None,
    "full_fine_tune": False,
    "full_epochs": None,
    "lr": 0.01,
    "full_lr": 0.03,
    "patience_for_lr_decay": 10,
    "folds": False,
    "neighbours": None,
}


def test_the_defaults_are_those_of_the_recipe():
    args = pirl_stl_train_test.make_parser().parse_args([])
    assert vars(args) == IN_BOTH_SCRIPTS | OF_PRETRAINING
    assert pirl_stl_train_test.DEFAULT_NEGATIVES == 6400
    args = train_stl_after_ssl.make_parser().parse_args([])
    assert vars(args) == IN_BOTH_SCRIPTS | OF_FINE_TUNING
