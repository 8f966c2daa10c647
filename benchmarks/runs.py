"""Runs of the two training scripts as a user would start them, each made once: what the tables here are made of."""

import subprocess
import sys
from pathlib import Path

import torch
from run_helpers import UserError, settings_of

import pirl_stl_train_test
import train_stl_after_ssl

ROOT = Path(__file__).parent.parent
SCRIPTS = {"pirl_stl_train_test.py": pirl_stl_train_test, "train_stl_after_ssl.py": train_stl_after_ssl}


def finished_run(folder, script, name, flags):
    """The content of folder/weights/<name>.pt, after the run that makes it, or the rest of it, where it is missing.

    flags are those of the run alone; a finished run of the same name with others is refused.
    """
    weights = folder / "weights" / f"{name}.pt"
    flags = [*map(str, flags), "--experiment-name", name, "--weights-dir", str(folder / "weights")]
    flags += ["--observations-dir", str(folder / "observations_dir")]
    if not weights.exists():
        print(f"\n$ python {script} {' '.join(flags)}", flush=True)
        status = subprocess.run([sys.executable, ROOT / script, *flags, "--resume", "True"]).returncode
        if status:
            sys.exit(status)  # the script has said why
    content = torch.load(weights, map_location="cpu", weights_only=True)
    module = SCRIPTS[script]
    asked, then = settings_of(module.parse_args(flags)), content["settings"]
    asked["batch_size"] = asked["batch_size"] or then.get("batch_size")  # None: the run's own choice
    differ = [k for k in asked if k not in module.MAY_DIFFER and asked[k] != then.get(k)]
    if differ:
        raise UserError(f"{weights} was made with another {', '.join(differ)}: remove {folder} to run all anew")
    return content


def pretrain(folder, name, flags):
    return finished_run(folder, "pirl_stl_train_test.py", name, flags)


def fine_tune(folder, name, flags):
    return finished_run(folder, "train_stl_after_ssl.py", name, flags)
