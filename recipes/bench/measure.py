"""How a benchmark measures: median time, peak memory above what was there, the rates that the machine reaches."""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CYCLES_PER_SECOND = 2e9
"""At least what a GPU's clock makes; for how long it is kept busy before a lap."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Run once; return the seconds it took on the device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(
    run: Callable[[], Any], device: torch.device, *, warmup: int = 1, repeats: int = 3
) -> float:
    """Return the median time of several runs, after some that do not count."""
    for _ in range(warmup):
        run()
    return statistics.median(timed(run, device) for _ in range(repeats))


def lap_seconds(
    runs: Sequence[Callable[[], Any]], device: torch.device, *, warmup: int = 2, repeats: int = 5
) -> float:
    """Return the time of a run: the median over laps, each of which runs all of ``runs`` once.

    The runs are the same work on other inputs, so that none finds its own in a cache. On CUDA a lap is timed
    by events, and the device is kept busy until the whole lap is queued: what is measured is the device's time,
    not that of the Python around it.
    """
    queued = 0.0
    for _ in range(warmup):
        synchronize(device)
        start = time.perf_counter()
        for run in runs:
            run()
        queued = time.perf_counter() - start
    if device.type != "cuda":
        return statistics.median(timed(run, device) for _ in range(repeats) for run in runs)
    laps = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        torch.cuda._sleep(int(CYCLES_PER_SECOND * min(1.5 * queued + 1e-3, 0.1)))
        begin.record()
        for run in runs:
            run()
        end.record()
        synchronize(device)
        laps.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(laps) / len(runs)


def copies_beyond_cache(size: int, device: torch.device, most: int = 16) -> int:
    """Return how many sets of ``size`` bytes it takes so that a lap over them finds nothing in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, math.ceil(4 * cache / max(size, 1))))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Run once; return the most bytes that were allocated at a time above those allocated before.

    On CUDA that is ``max_memory_allocated``. On the CPU it is the same sum, of every allocation and release of
    torch's CPU allocator as ``torch.profiler`` records them: exact, scratch space inside kernels included, and
    independent of what the C library keeps of freed memory, which resident-set size is not.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        current += change
        peak = max(peak, current)
    return peak


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Return the FLOP/s of a square matrix product of random numbers: what this machine can reach at most.

    Args:
        dtype: Of the matrices.
        device: Where to run.
        size: Rows. Default: 8192 on CUDA, else 1024.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / lap_seconds([functools.partial(torch.mm, a, b)], device)


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Return the bytes/s, read and written together, of copying random numbers: the memory's bandwidth.

    Args:
        device: Where to run.
        size: Bytes copied. Default: 2 GiB on CUDA, else 64 MiB.
    """
    size = size or (2**31 if device.type == "cuda" else 2**26)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / lap_seconds([functools.partial(target.copy_, source)], device)
