"""Tensors of more than 2^31 elements, for tests of how kernels count."""

import numpy as np
import torch
from torch import Tensor

MORE_THAN_INT32 = (1, 1, 2**16, 2**15 + 1)


def zeros(*shape: int) -> Tensor:
    """bfloat16; memory is taken where it is written, and to take 4 GiB lasts seconds."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)
