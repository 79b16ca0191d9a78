"""Puts this folder on the path, where the scripts find their modules too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
