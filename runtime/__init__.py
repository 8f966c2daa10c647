"""What any training program needs; PIRL itself is in the files of the root."""

import platform
import sys

if not (3, 11, 4) <= sys.version_info < (3, 14):
    version = platform.python_version()
    sys.exit(f"error: this is Python {version}: use Python 3.11.4 to 3.13")
