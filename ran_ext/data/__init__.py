"""CIFAR-10: verified files in memory, batches and augmentation on the device, and a sample that needs no download.

>>> from ran_ext.data import Augment, Batches, Normalize, sample
>>> train = sample("train")
>>> augment = Augment(Normalize.per_pixel(train))
>>> images, labels = next(iter(Batches(train, 128, augment)))
>>> images.dtype, tuple(images.shape), tuple(labels.shape)
(torch.float32, (128, 3, 32, 32), (128,))
"""

from .augment import Augment, Normalize
from .batches import Batches
from .cifar10 import CIFAR10, sample, split_validation, to_float
from .corruptions import CORRUPTIONS, corrupt
from .formats import CLASSES, DatasetError

__all__ = [
    "CIFAR10",
    "CLASSES",
    "CORRUPTIONS",
    "Augment",
    "Batches",
    "DatasetError",
    "Normalize",
    "corrupt",
    "sample",
    "split_validation",
    "to_float",
]
