"""Settings of a process on its machine: cores, memory, precision, and the process group."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous
from transformers import TrainingArguments

PRECISIONS = ("fp32", "bf16", "fp16")
# Instructions that multiply bf16: without them it is emulated, and slower than fp32.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> float:
    """Memory in bytes that a container allows; infinite if none says so."""
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        try:
            return float(Path("/sys/fs/cgroup", file).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return math.inf


def set_num_threads(num_threads: int | None = None) -> int:
    """Set torch's threads to the cores of this process; `accelerate launch` sets only one on a CPU machine.

    Args:
        num_threads: Number of threads; by default the available cores divided among the processes of this machine.
    """
    if num_threads is None:
        num_threads = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(num_threads)
    # Otherwise accelerate chooses again with each `TrainingArguments`, with several processes on the CPU.
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    return num_threads


def default_precision(use_cpu: bool) -> str:
    """Return `"bf16"` where the processor computes in it, else `"fp32"`.

    Mixed precision in bf16 needs no scaling of the loss. On an AMD EPYC with AVX512-BF16 it made a training step of a
    ResNet-32 at 32 pixels 2.6 times as fast as fp32 (both with channels-last weights), one of a ViT-Ti at 224 pixels
    1.8 times; a tiny network at 16 pixels gained nothing, and an EfficientNet lost a fifth. So a run on a CPU
    measures whether bf16 pays (`bkd_hf.precision`).

    Args:
        use_cpu: Whether the CPU is used even if there is a GPU.
    """
    if not use_cpu and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not use_cpu and torch.accelerator.is_available():
        return "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in _BF16_INSTRUCTIONS) else "fp32"


def precision_of(args: TrainingArguments) -> str:
    """Return the precision set by options."""
    return {"no": "fp32"}.get(args.mixed_precision, args.mixed_precision)


# Environment variables of a launcher or a saved configuration of accelerate.
_LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")


def launcher_precision() -> str | None:
    """Return the mixed precision that the launcher requests, `None` for none."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if precision == "no" else precision


def launcher_compiler() -> str | None:
    """Return the `--torch_compile_backend` that the launcher requests, `None` for none."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower()
    return None if backend == "no" else backend


def launcher_shards(*engines: str) -> bool:
    """Return whether the launcher requests one of these engines; by default `"FSDP"` and `"DEEPSPEED"`."""
    names = [f"ACCELERATE_USE_{name}" for name in engines or ("FSDP", "DEEPSPEED")]
    return any(os.environ.get(name, "false").lower() in ("true", "1") for name in names)


def launcher_accumulation() -> str | None:
    """Return the accumulation steps given to `accelerate launch`, which it passes only to DeepSpeed."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    script = next((number for number, word in enumerate(words) if word in (sys.argv[0], "bkd_hf")), 0)
    words = words[:script]
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if "launch" in words[:number] and name.replace("-", "_") == "__gradient_accumulation_steps":
            return value or "".join(words[number + 1 : number + 2])
    return os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")


@contextmanager
def options_alone() -> Iterator[None]:
    """Hide the launcher's settings from libraries, as the options include or override them."""
    found = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


@contextmanager
def collect_only_new_garbage() -> Iterator[None]:
    """Let garbage collections look at new objects only.

    `Trainer` collects garbage before and after each training, and would scan all imported modules each time, which
    takes a quarter of a second.
    """
    if gc.get_freeze_count():  # of whoever calls this
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def keep_freed_memory() -> None:
    """Let glibc, if it is the C library, keep freed memory.

    It would return the activations of each training step to the system, and get the same memory again, page by page,
    in the next step. On a CPU, this takes a seventh of a step of a ResNet-32, a fifth with a ResNet-18 at 224 pixels.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_MMAP_THRESHOLD, 2**30)


def join_process_group(args: TrainingArguments) -> None:
    """Join the process group of a launcher on the CPU; transformers would ignore `ddp_timeout` there."""
    on_cpu = args.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    is_one_of_several = {"RANK", "MASTER_ADDR"} <= {*os.environ} and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if on_cpu and is_one_of_several and distributed.is_available() and not distributed.is_initialized():
        timeout = timedelta(seconds=args.ddp_timeout)
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps its store after a restart, with the addresses of the previous processes.
        store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = args.ddp_backend or "gloo"
        distributed.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)


def leave_process_group() -> None:
    """Leave the process group, if there is one, and end its threads.

    A process that ends while gloo's threads run may be aborted, even with its work done. Models in
    `DistributedDataParallel` keep these threads; their trainers form cycles that only the garbage collector frees.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()
