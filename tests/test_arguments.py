"""Command lines: the types of arguments, --help, and the defaults."""

import argparse
import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import SCRIPTS

import pirl_stl_train_test
import train_stl_after_ssl
from runtime.arguments import (
    Parser,
    bool_flag,
    bounded,
    device_name,
    experiment_name,
    file_path,
    non_empty,
    output_file,
)


def refused(kind, text, match=None):
    with pytest.raises(argparse.ArgumentTypeError, match=match):
        kind(text)
    return True


# ---- Types ---------------------------------------------------------------------------
def test_booleans_mean_what_they_say():
    parser = Parser("A script.")
    parser.add_argument("--on", **bool_flag(True))
    parser.add_argument("--off", **bool_flag(False))
    assert vars(parser.parse_args([])) == {"on": True, "off": False}
    assert parser.parse_args(["--off"]).off is True
    for text in ("True", "yes", "1", "tRUE"):
        assert parser.parse_args(["--off", text]).off is True
    for text in ("FALSE", "no", "0", "False"):
        assert parser.parse_args(["--on", text]).on is False


def test_numbers_within_bounds():
    whole = bounded(int, 1, 5)
    real = bounded(float, 0, 1)
    assert [whole("1"), whole("5")] == [1, 5]
    assert [real("0"), real("1"), real("1e-2")] == [0, 1, 0.01]
    for text in ("0", "6"):
        assert refused(whole, text, f"^{text} must be at least 1 and at most 5$")
    for text in ("nan", "-inf", "inf", "1.1", "-0.1"):
        assert refused(real, text, f"^{text} must be at least 0 and at most 1$")
    for text in ("1e2", "1.5", "x", ""):
        expected = f"^{re.escape(repr(text))} is not a whole number$"
        assert refused(whole, text, expected)
    assert refused(real, "x", "^'x' is not a number$")


def test_an_empty_text_is_refused():
    """It is most often a shell variable that is not set."""
    for kind in (file_path, non_empty, output_file):
        assert refused(kind, "", "shell variable")
    assert refused(experiment_name, "")


def test_names_of_experiments():
    for name in ("e1_resnet18_", "lr=0.1, seed 3", "größe", "x" * 200):
        assert experiment_name(name) == name
    for name in ("../x", "a/b", ".x", "-x", "x\ny", "x\n", " "):
        assert refused(experiment_name, name, "plain file name")
    for name in ("x" * 201, "ö" * 101):
        assert refused(experiment_name, name, "longer than 200 bytes")


def test_names_of_devices():
    for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:12"):
        assert device_name(name) == name
    for name in ("", "gpu", "mps", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cpu:0"):
        assert refused(device_name, name, "is not auto, cpu, cuda or cuda:N")


def test_the_home_folder(monkeypatch):
    """The shell leaves the ~ of --flag=~/folder as it is."""
    monkeypatch.setenv("HOME", "/somewhere")
    assert file_path("~/folder") == Path("/somewhere/folder")
    assert file_path("a/~b") == Path("a/~b")
    assert file_path("~nosuchuser/x") == Path("~nosuchuser/x"), "there is no such user"


def test_a_file_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    Path("to_a_file").symlink_to("new/below.png")
    Path("to_nothing").symlink_to("file/below.png")
    Path("loop").symlink_to("loop")
    for name in ("new.png", "file", "folder/new.png", "a/b/c.png", "to_a_file"):
        assert output_file(name) == Path(name)
    assert not Path("a").exists(), "only the work itself makes folders"

    assert refused(output_file, "folder", "^folder is a folder, not a file$")
    assert refused(output_file, os.devnull, "not a regular file")
    assert refused(output_file, "file/new.png", f"^{tmp_path}/file is not a folder$")
    assert refused(output_file, "to_nothing", "file is not a folder")
    assert refused(output_file, "loop/new.png", f"^{tmp_path}/loop is not a folder$")

    # Root may write everywhere.
    locked = str(tmp_path / "folder")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != locked)
    assert output_file("file") == Path("file")
    assert refused(output_file, "folder/a/b.png", f"^{locked} is not writable$")


# ---- The parsers ---------------------------------------------------------------------
@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(script) is its parser, made as by python -OO: without docstrings."""

    def parser_of(script):
        made = []

        def stop(parser, argv):
            made.append(parser)
            raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(SCRIPTS[script], "__doc__", None)
            patch.setattr(Parser, "parse_args", stop)
            with pytest.raises(SystemExit):
                SCRIPTS[script].main([])
        return made[0]

    return parser_of


def flags_of(parser):
    """The action of every flag, by the flag's name."""
    return {action.option_strings[-1]: action for action in parser._actions}


every_script = pytest.mark.parametrize("script", SCRIPTS)


@every_script
def test_help_states_each_default_once(parser_of, script):
    """As "(default: X)" if it is a value, else in words or not at all."""
    parser = parser_of(script)
    text = parser.format_help().split("\nexample:")[0]
    # The flags, each followed by its lines.
    parts = re.split(r"^  (--[\w-]+)", text, flags=re.M)[1:]
    for flag, lines in zip(parts[::2], parts[1::2], strict=True):
        entry = " ".join(lines.split())
        default = flags_of(parser)[flag].default
        if default is None:
            assert "(default" not in entry, flag
        else:
            assert f"(default: {default})" in entry, flag
            assert entry.count("default") == 1, flag
    assert "None" not in text


def test_a_default_that_is_in_the_words_is_not_repeated():
    parser = Parser("A script.")
    parser.add_argument("--days", default=7, help="how many, by default a week")
    parser.add_argument("--hours", default=24, help="how many")
    lines = parser.format_help().splitlines()
    assert lines[-2].endswith("how many, by default a week")
    assert lines[-1].endswith("how many (default: 24)")


@every_script
def test_help_ends_with_an_example_that_parses(parser_of, script):
    parser = parser_of(script)
    heading, command = parser.format_help().rstrip().splitlines()[-2:]
    assert heading == "example:"
    python, file, *flags = shlex.split(command)
    assert (python, file) == ("python", f"{script}.py")
    known, unknown = argparse.ArgumentParser.parse_known_args(parser, flags)
    assert not unknown
    assert vars(known).keys() >= {"data_dir"} or known.images


def test_help_begins_with_what_everybody_sets_and_ends_with_what_few_do(parser_of):
    first = ["--data-dir", "--experiment-name", "--epochs", "--batch-size", "--lr"]
    files = ["--resume", "--checkpoint-minutes", "--weights-dir", "--observations-dir"]
    warm_start = ["--pirl-model-name", "--warm-start", "--cont-epoch"]
    for script, last in (
        ("pirl_stl_train_test", files + warm_start),
        ("train_stl_after_ssl", files),
    ):
        text = parser_of(script).format_help()
        order = re.findall(r"^  (--[\w-]+)", text, re.M)
        assert order[:5] == first
        assert order[-len(last) :] == last


# What --help says of a flag's values; without an upper end, their smallest.
RANGES = {
    "pirl_stl_train_test": {
        "--lr": (0, 100),
        "--weight-decay": (0, 1),
        "--image-size": (36, 224),
        "--crop-area": (0.01, 1),
        "--colour-strength": (0, 2),
        "--loss-weight": (0, 1),
        "--temp-parameter": (0.01, 100),
        "--beta": (0, 0.999),
        "--epochs": (1, None),
        "--batch-size": (1, None),
        "--seed": (0, None),
        "--checkpoint-minutes": (0, None),
        "--count-negatives": (1, None),
        "--warmup-steps": (0, None),
        "--tmax-for-cos-decay": (1, None),
        "--knn-every": (0, None),
        "--cont-epoch": (1, None),
    },
    "train_stl_after_ssl": {
        "--full-lr": (0, 100),
        "--full-epochs": (1, None),
        "--patience-for-lr-decay": (0, None),
    },
    "extract_features": {"--image-size": (36, 224), "--batch-size": (1, 128)},
    "pictures": {
        "--images": (1, 100),
        "--image-size": (36, 224),
        "--colour-strength": (0, 2),
    },
}


@pytest.mark.parametrize("script", RANGES)
def test_ranges_are_shown_and_kept_to(parser_of, script):
    actions = flags_of(parser_of(script))
    for flag, (low, high) in RANGES[script].items():
        action = actions[flag]
        assert action.type(str(low)) == low
        for text in (f"{low - 1:g}", f"{low - 0.001:g}"):
            assert refused(action.type, text), flag
        if high is not None:
            words = action.help.replace("0 (none)", "0")
            assert f"{low} to {high}" in words, flag
            assert action.type(str(high)) == high
            for text in (f"{high + 1:g}", f"{high + 0.001:g}"):
                assert refused(action.type, text), flag


def test_seeds_are_of_32_bits(parser_of):
    for script in ("pirl_stl_train_test", "train_stl_after_ssl", "pictures"):
        seed = flags_of(parser_of(script))["--seed"].type
        assert seed(str(2**32 - 1)) == 2**32 - 1
        assert refused(seed, str(2**32))


def test_every_flag_of_a_path_expands_the_home_folder(parser_of, monkeypatch, tmp_path):
    """--weights-dir=~/x must not make a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {}
    for script in SCRIPTS:
        for flag, action in flags_of(parser_of(script)).items():
            if action.metavar == "PATH":
                assert action.type("~/x") == tmp_path / "x", flag
                paths.setdefault(script, set()).add(flag)
    folders = {"--data-dir", "--weights-dir", "--observations-dir"}
    assert paths == {
        "stl10_data_load": {"--raw-dir", "--data-dir"},
        "pirl_stl_train_test": folders,
        "train_stl_after_ssl": folders | {"--neighbours"},
        "extract_features": {
            *("--images", "--out", "--neighbours", "--queries", "--weights-dir")
        },
        "pictures": {"--data-dir", "--out"},
    }


def test_files_that_cannot_be_written_are_usage_errors(call, tmp_path):
    """Before any work: it would be lost."""
    model = ("--model", "m", "--images", "i")
    for script, flag, other in (
        ("extract_features", "--out", model),
        ("extract_features", "--neighbours", model),
        ("train_stl_after_ssl", "--neighbours", ()),
        ("pictures", "--out", ()),
    ):
        outcome = call(script, *other, flag, tmp_path)
        problem = f"argument {flag}: {tmp_path} is a folder"
        assert outcome.is_one_line_error(problem, status=2)


# ---- The defaults --------------------------------------------------------------------
# The guide says why they are what they are; the README's figures rest on them.
IN_BOTH_SCRIPTS = {
    "data_dir": Path("stl10_data"),
    "weights_dir": Path("weights"),
    "observations_dir": Path("observations_dir"),
    "zero_init": True,
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
    "experiment_name": "e1_pirl_",
    "model_type": "res18",
    "image_size": 96,
    "stem": "imagenet",
    "only_train": False,
    "crop_area": 0.2,
    "colour_strength": 0.5,
    "images_on": "auto",
    "non_linear_head": False,
    "compile": False,
    "cuda_graph": False,
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
    # These three: as the file of weights says.
    "model_type": None,
    "image_size": None,
    "stem": None,
    "full_fine_tune": False,
    "full_epochs": None,
    "lr": 0.01,
    "full_lr": 0.03,
    "patience_for_lr_decay": 10,
    "folds": False,
    "neighbours": None,
    "evaluate": False,
}


def test_the_defaults_are_those_of_the_guide():
    args = pirl_stl_train_test.make_parser().parse_args([])
    assert vars(args) == IN_BOTH_SCRIPTS | OF_PRETRAINING
    assert pirl_stl_train_test.DEFAULT_NEGATIVES == 6400
    args = train_stl_after_ssl.make_parser().parse_args([])
    assert vars(args) == IN_BOTH_SCRIPTS | OF_FINE_TUNING


def test_the_reference_s_two_commands_work_verbatim():
    pretraining = "--model-type res18 --batch-size 128 --lr 0.1 --experiment-name exp"
    args = pirl_stl_train_test.make_parser().parse_args(pretraining.split())
    given = {"lr": 0.1, "experiment_name": "exp"}
    assert vars(args) == IN_BOTH_SCRIPTS | OF_PRETRAINING | given

    labelled = (
        "--model-type res18 --batch-size 128 --lr 0.1 --patience-for-lr-decay 4 "
        "--full-fine-tune True --pirl-model-name exp"
    )
    args = train_stl_after_ssl.make_parser().parse_args(labelled.split())
    given = {"model_type": "res18", "lr": 0.1, "patience_for_lr_decay": 4}
    given |= {"full_fine_tune": True, "pirl_model_name": "exp"}
    assert vars(args) == IN_BOTH_SCRIPTS | OF_FINE_TUNING | given
