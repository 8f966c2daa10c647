"""A training script with conftest.py's thin trunk, in a process of its own: thin_script.py <script> <its arguments>."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_helpers as rh
from conftest import ThinResNet18

import models

if __name__ == "__main__":
    models.TRUNKS["res18"] = ThinResNet18
    del sys.argv[0]
    rh.run_script(importlib.import_module(sys.argv[0]).main)
