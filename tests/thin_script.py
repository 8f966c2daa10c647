"""A script with conftest.py's thin trunk: thin_script.py <script> <its arguments>."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import ThinResNet

import models
from runtime.script import run_script

if __name__ == "__main__":
    models.TRUNKS["res18"] = ThinResNet
    del sys.argv[0]
    run_script(importlib.import_module(sys.argv[0]).main)
