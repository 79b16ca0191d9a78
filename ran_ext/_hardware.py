"""Which of the 16-bit types a device multiplies in hardware."""

from __future__ import annotations

import os
import platform

import torch

#: oneDNN, held to one of these, takes bfloat16 and emulates it: 0.6 times float32's speed, measured in a training step.
_EMULATES = ("AVX512_CORE", "AVX512_CORE_VNNI")


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether convolutions in bfloat16 run on instructions made for them on ``device``; elsewhere they are emulated.

    That is so on GPUs of sm_80 and up, on x86 with AVX512-BF16 or AMX, and on ARM with BF16. On a CPU the convolutions
    are oneDNN's, so ``ONEDNN_MAX_CPU_ISA`` counts; ``ATEN_CPU_CAPABILITY``, which chooses the other kernels, does not.
    ``torch.ops.mkldnn._is_mkldnn_bf16_supported()`` is not enough: it is true on any AVX-512 processor.

    >>> multiplies_bfloat16("meta")
    False
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return True  # there it asks the processor for BF16 itself
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    in_processor = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return in_processor and limit.upper() not in _EMULATES
