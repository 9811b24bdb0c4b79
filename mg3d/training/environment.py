"""Process defaults that must be in place before torch starts; this file never imports torch.

glibc reads its malloc variables once, when a process starts. On a machine that trains on its CPU the default
allocator returns every large tensor to the kernel and faults it in again at the next step; keeping the memory, and
asking for huge pages, is worth a multiple in speed. The only way to set such a variable late is to start Python again.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from mg3d.errors import EnvironmentProblem

log = logging.getLogger(__name__)

GUARD = "MG3D_PROCESS_DEFAULTS"
"""Set once the process was started again ("applied"); a user sets it to "off" to keep the plain allocator."""

PROCESS_DEFAULTS: dict[str, str] = {
    "THP_MEM_ALLOC_ENABLE": "1",  # torch: align large CPU tensors for transparent huge pages
    "MALLOC_MMAP_MAX_": "0",  # serve large blocks from the heap, which stays mapped between steps
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),  # bytes; do not give the top of the heap back
    "MALLOC_TOP_PAD_": str(1 << 26),  # bytes; grow the heap by 64 MiB at a time
    "MALLOC_ARENA_MAX": "1",  # one heap, so that what one thread frees another can reuse
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep: spinning ones starve each other as soon as a core is shared
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WANTED_OPEN_FILES = 4096
LOW_OPEN_FILES = 1024


def cpu_only(environ: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> bool:
    """Whether no NVIDIA device can be used by this process (no device node, or all of them hidden)."""
    environ = os.environ if environ is None else environ
    if environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return True
    return not any(devices.glob("nvidia[0-9]*"))


def missing_defaults(environ: Mapping[str, str], num_threads: int = 0) -> dict[str, str]:
    """Variables this process should have been started with and was not.

    Args:
        environ: the process environment; a variable the user set is never touched.
        num_threads: intra-op threads, 0 to leave the choice to torch.
    """
    wanted = dict(PROCESS_DEFAULTS)
    if num_threads > 0:
        wanted.update(dict.fromkeys(THREAD_VARIABLES, str(num_threads)))
    return {key: value for key, value in wanted.items() if key not in environ}


def ensure_process_defaults(num_threads: int = 0, environ: MutableMapping[str, str] | None = None) -> None:
    """Start Python again, once, with the allocator and thread defaults of a CPU run.

    Does nothing on a machine with a usable GPU, outside Linux, when every variable is there already, or when the user
    exported ``MG3D_PROCESS_DEFAULTS=off``. Call it at the top of an entry script, before anything heavy is imported:
    the process keeps its id, its arguments and its standard streams.

    Args:
        num_threads: intra-op threads to ask for, 0 to leave them.
        environ: the environment to complete, by default this process's.
    """
    environ = os.environ if environ is None else environ
    if GUARD in environ or not sys.platform.startswith("linux") or not cpu_only(environ):
        return
    missing = missing_defaults(environ, num_threads)
    if not missing:
        return
    environ.update(missing, **{GUARD: "applied"})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ))


def raise_open_file_limit(wanted: int = WANTED_OPEN_FILES) -> int:
    """Raise the soft limit on open files towards the hard one; loader workers pass tensors as file descriptors.

    Args:
        wanted: number of descriptors to ask for.

    Returns:
        The soft limit now in force.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < ceiling:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
        soft = ceiling
    return soft


def shared_memory_free_bytes(mount: Path = Path("/dev/shm")) -> int | None:
    """Free bytes of the shared-memory file system, None where there is none."""
    if not mount.is_dir():
        return None
    state = os.statvfs(mount)
    return state.f_bavail * state.f_frsize


def check_shared_memory(num_workers: int, bytes_per_batch: int, prefetch: int = 2, free: int | None = None) -> None:
    """Refuse a loader whose batches in flight cannot fit in shared memory (the alternative is a bus error mid-run).

    Args:
        num_workers: loader workers of this process.
        bytes_per_batch: size of one collated batch.
        prefetch: batches each worker keeps ready.
        free: free bytes of shared memory; measured when None.

    Raises:
        EnvironmentProblem: the space is too small, with both figures.
    """
    free = shared_memory_free_bytes() if free is None else free
    needed = num_workers * prefetch * bytes_per_batch
    if num_workers > 0 and free is not None and needed > free:
        raise EnvironmentProblem(
            f"{num_workers} loader workers need about {needed >> 20} MiB of shared memory, {free >> 20} MiB are free",
            "set num_workers=0 or fewer workers, or start the container with a larger --shm-size",
        )
