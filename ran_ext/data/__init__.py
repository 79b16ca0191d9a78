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
from .cifar10 import CIFAR10, sample
from .cifar100 import CIFAR100
from .corruptions import CORRUPTIONS, corrupt
from .folders import PictureFolder, open_data
from .formats import CLASSES, DatasetError
from .images import Images, split_validation, to_float

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CLASSES",
    "CORRUPTIONS",
    "Augment",
    "Batches",
    "DatasetError",
    "Images",
    "Normalize",
    "PictureFolder",
    "corrupt",
    "open_data",
    "sample",
    "split_validation",
    "to_float",
]
