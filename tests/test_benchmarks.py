"""The tables: made from runs' own files, each run once."""

import shlex
from types import SimpleNamespace

import pytest
from run_helpers import UserError

from benchmarks import recipe, results, runs


@pytest.fixture
def folder(call, data_dir, tmp_path, monkeypatch):
    """Runs are made in this process instead of one of their own, and counted."""

    def run(command):
        made.append(command)
        outcome = call(command[1].stem, *command[2:])
        assert outcome.status == 0, outcome.err
        return SimpleNamespace(returncode=0)

    made = []
    monkeypatch.setattr(runs.subprocess, "run", run)
    return SimpleNamespace(path=tmp_path / "runs", made=made)


SMALL = "--image-size 36 --device cpu"


def test_results(folder, data_dir, monkeypatch):
    """All stages once; then nothing is run again, and a change of settings is refused."""

    def make_table(flags):
        command = ["results", "--data-dir", str(data_dir), "--results-dir", str(folder.path), "--seeds", "2"]
        command += ["--epochs", "1", "--labelled-epochs", "2", f"--common-flags={SMALL}"]
        monkeypatch.setattr("sys.argv", [*command, f"--flags={flags}", "--labelled-flags=--batch-size 16"])
        results.main()

    make_table("--only-train True")
    make_table("--only-train True")
    assert len(folder.made) == 6
    lines = (folder.path / "data.md").read_text().splitlines()
    for trunk in ("random", "PIRL"):
        for stage in (results.NEIGHBOURS, results.SOFTMAX, results.FULL):
            (line,) = [line for line in lines if line.startswith(f"{stage}, {trunk} trunk | ") and "%" in line]
            assert line.count("±") == 2
    assert (folder.path / "data.png").exists()
    with pytest.raises(UserError, match="another lr"):
        make_table("--only-train True --lr 0.1")


def test_recipe_rows(folder, data_dir, tmp_path, monkeypatch):
    table = tmp_path / "recipe.md"
    command = ["recipe", "--data-dir", str(data_dir), "--runs-dir", str(folder.path), "--out", str(table)]
    monkeypatch.setattr(recipe, "ROWS", {"default": SMALL, "random-bank": f"{SMALL} --bank-start random"})
    labelled = recipe.fine_tune
    small = shlex.split(f"{SMALL} --epochs 2 --batch-size 16")
    monkeypatch.setattr(recipe, "fine_tune", lambda where, name, flags: labelled(where, name, [*flags, *small]))
    monkeypatch.setattr(
        "sys.argv", [*command, "--epochs", "1", "--precision", "fp32", "--rows", "default", "random-bank", "random"]
    )
    recipe.main()
    text = table.read_text()
    commands = [line.split(" | ")[0] for line in text.splitlines() if line.startswith(("| `", "| random"))]
    assert len(commands) == 3
    assert any("--bank-start random" in each for each in commands)
    assert any(each == "| random trunk, `--zero-init True`" for each in commands)
    assert not any("--batch-size" in each for each in commands)
    monkeypatch.setattr("sys.argv", [*command[:3], "--runs-dir", str(tmp_path / "none"), "--out", str(table)])
    recipe.main()
    assert table.read_text() == text, "rows of runs whose files are gone stay"
    table.write_text(text.replace("lr 0.2", "lr 0.1"))
    with pytest.raises(UserError, match="other defaults"):
        recipe.main()
