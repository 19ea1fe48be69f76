"""What a process takes of its machine: cores, memory, and threads that it must end."""

from __future__ import annotations

import ctypes
import gc
import os

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(num_threads: int | None = None) -> int:
    """Give torch the cores of this process: `accelerate launch` leaves it one thread on a CPU machine.

    Args:
        num_threads: How many; by default the available cores divided among the processes of this machine.
    """
    if num_threads is None:
        num_threads = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(num_threads)
    return num_threads


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, where it is glibc.

    It would give the activations of each training step back to the system, to get the same memory anew, page by page,
    in the next one: on a CPU a seventh of a step of a ResNet-32, a fifth of one of a ResNet-18 at 224 pixels.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_MMAP_THRESHOLD, 2**30)


def leave_process_group() -> None:
    """Leave the process group, if there is one, and end its threads.

    A process that ends with the threads of gloo running may be aborted, with all its work done. Models in
    `DistributedDataParallel` hold them; their trainers, which know each other, go only when garbage is collected.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()
