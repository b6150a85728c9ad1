"""Chips that models are trained on, as their makers' data sheets have them."""

import contextlib
import os
import re
import resource
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

GB, GIB = 1e9, 2.0**30
# FLOP/s.
T = 1e12


@dataclass(frozen=True)
class Chip:
    """A chip at its peak: FLOP/s without sparsity, bytes, and bytes a second in each direction.

    kind: what JAX's `device_kind` has in it. 'TPU v5' is a v5p, and the beginning of 'TPU v5 lite', a v5e.
    float8: peak of float8 products; None where they are no faster than those of bfloat16.
    links: to the `linked` chips (itself among them) that have fast links to each other, over all its links together.
    network: to all others, its share of the adapters of its machine.
    """

    kind: str
    bfloat16: float
    float8: float | None
    memory: float
    bandwidth: float
    links: float
    linked: int
    network: float

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products of a type. What is wider than bfloat16 is counted as bfloat16 is."""
        return self.float8 or self.bfloat16 if dtype.startswith("float8") else self.bfloat16


# Makers give a link's both directions together; here is one of them. GPUs are those of an HGX board of eight with an
# adapter each; links of TPUs reach all of a pod.
CHIPS = {
    # NVIDIA A100 data sheet (SXM, 80 GB): NVLink 600 GB/s. DGX A100: adapters of 200 Gbit/s.
    "a100": Chip("A100", 312 * T, None, 80 * GB, 2.039e12, 300 * GB, 8, 25 * GB),
    # NVIDIA H100 data sheet (SXM): NVLink 900 GB/s. DGX H100: adapters of 400 Gbit/s.
    "h100": Chip("H100", 989 * T, 1979 * T, 80 * GB, 3.35e12, 450 * GB, 8, 50 * GB),
    # NVIDIA H200 data sheet (SXM).
    "h200": Chip("H200", 989 * T, 1979 * T, 141 * GB, 4.8e12, 450 * GB, 8, 50 * GB),
    # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 72 PFLOP/s of float8, NVLink 14.4 TB/s.
    "b200": Chip("B200", 2250 * T, 4500 * T, 180 * GB, 8e12, 900 * GB, 8, 50 * GB),
    # docs.cloud.google.com/tpu/docs/v4; six links of 50 GB/s (arXiv 2304.01433).
    "v4": Chip("TPU v4", 275 * T, None, 32 * GIB, 1.2e12, 300 * GB, 4096, 6.25 * GB),
    # docs.cloud.google.com/tpu/docs/v5e: 400 GB/s both ways; 6.4 Tbit/s for the pod of 256.
    "v5e": Chip("TPU v5 lite", 197 * T, None, 16 * GIB, 8.19e11, 200 * GB, 256, 3.125 * GB),
    # docs.cloud.google.com/tpu/docs/v5p: 1200 GB/s both ways; 50 Gbit/s a chip.
    "v5p": Chip("TPU v5", 459 * T, None, 95 * GIB, 2.765e12, 600 * GB, 8960, 6.25 * GB),
    # docs.cloud.google.com/tpu/docs/v6e: 800 GB/s both ways; four adapters of 200 Gbit/s for eight chips.
    "v6e": Chip("TPU v6 lite", 918 * T, None, 32 * GIB, 1.638e12, 400 * GB, 256, 12.5 * GB),
}


# The devices of this process: how fast they could be.

# Peak dense bfloat16 FLOP/s, by what JAX calls the chip.
PEAK_FLOPS = {chip.kind: chip.bfloat16 for chip in CHIPS.values()}


@cache
def device_peak_flops() -> float:
    """FLOP/s that one device could do at best: from a data sheet, or else of a float32 matrix product timed once."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if name.lower() in kind.lower():
            return peak
    return _timed_matrix_product()


def _timed_matrix_product(size: int = 1024, repeats: int = 3) -> float:
    product = jax.jit(jnp.dot)
    matrix = np.ones((size, size), np.float32)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


# What a sweep is planned for: the devices here, their free memory and their speed, without starting JAX on a CPU.

# What Linux says of main memory.
MEMORY = Path("/proc/meminfo")
# In a container, the root of the cgroup hierarchy is the process's own cgroup.
CONTROL_GROUP = Path("/sys/fs/cgroup")
ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin", "libtpu")


@dataclass(frozen=True)
class Machine:
    """So many devices of a platform, each with so many bytes of free memory and FLOP/s at its peak (0: not known)."""

    platform: str
    n_devices: int
    memory: float
    flops: float


def this_machine() -> Machine:
    """The machine of this process. On a CPU every core is a device, unless XLA was told otherwise; JAX is not asked."""
    if not any(find_spec(plugin) for plugin in ACCELERATOR_PLUGINS) or jax.default_backend() == "cpu":
        n_devices = _told_to_xla() or cores()
        return Machine("cpu", n_devices, free_memory() / n_devices, 0.0)
    return used_machine()


def used_machine() -> Machine:
    """Return the devices of this process and their memory, initializing JAX. CPU devices share main memory."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return Machine("cpu", len(devices), free_memory() / len(devices), 0.0)
    return Machine(devices[0].platform, len(devices), device_memory(devices[0]), device_peak_flops())


def use_cores_as_devices() -> None:
    """Make each core of a CPU a device of its own, as `use_cpu_devices` does."""
    use_cpu_devices(cores())


def use_cpu_devices(count: int) -> None:
    """Make a CPU so many devices. To be called before JAX is used; accelerators, and what XLA was told, stay."""
    if _told_to_xla() is None:
        jax.config.update("jax_num_cpu_devices", count)


def _told_to_xla() -> int | None:
    """The devices that XLA was told to make of a CPU; None if it was not."""
    told = re.findall(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(told[-1]) if told else None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def device_memory(device: jax.Device) -> int:
    """Bytes of free memory of a device; on a CPU those that processes could still be given."""
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", free_memory()) - statistics.get("bytes_in_use", 0)


def free_memory() -> int:
    """Return the bytes of main memory that this process can still allocate, given its system, cgroup and limits.

    On systems other than Linux, this is the total memory.
    """
    if not MEMORY.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":") for line in MEMORY.read_text(encoding="ascii").splitlines())
    return max(0, min(int(fields["MemAvailable"].split()[0]) * 1024, _left_in_group(), _left_in_address_space()))


def _left_in_group() -> int:
    """Return the bytes left in the cgroup of this process, such as that of a container or a cluster job."""
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((CONTROL_GROUP / name).read_text() for name in ("memory.max", "memory.current"))
        # The page cache can be reclaimed, including its active part.
        statistics = (CONTROL_GROUP / "memory.stat").read_text()
        kept = re.findall(r"^(?:in)?active_file (\d+)$", statistics, re.MULTILINE)
        return int(limit) - int(used) + sum(map(int, kept))
    return sys.maxsize


def _left_in_address_space() -> int:
    """Return the bytes of address space left under `ulimit -v`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return limit - pages * os.sysconf("SC_PAGE_SIZE")
