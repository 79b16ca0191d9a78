#!/usr/bin/env python
"""Train a residual attention network on CIFAR-10; ``--help`` explains every flag.

python scripts/train_cifar10.py --preset sample                      the embedded images, up to ten minutes
python scripts/train_cifar10.py --preset sample --scale full         the same in 20 epochs, however long that takes
python scripts/train_cifar10.py --data data                          the report's recipe on the whole set
torchrun --nproc_per_node=2 scripts/train_cifar10.py --data data     the same, shared by two processes
"""

import sys

from ran_ext.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
