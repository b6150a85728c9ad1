"""Peak rates of accelerators from data sheets, the devices and memory of this machine, and automatic data types."""

import contextlib
import os
import re
import resource
import sys
import timeit
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GB, GIB = 1e9, 2.0**30
# FLOP/s.
T = 1e12


@dataclass(frozen=True)
class Chip:
    """Peak rates of a chip: FLOP/s without sparsity, bytes, and bytes per second in each direction.

    Attributes:
        kind: A substring of JAX's `device_kind`. 'TPU v5', a v5p, is also a prefix of 'TPU v5 lite', a v5e, which is
            therefore first in CHIPS.
        bfloat16: FLOP/s of bfloat16 matrix products.
        float8: FLOP/s of float8 matrix products; None if they are no faster than bfloat16.
        memory: Bytes of memory.
        bandwidth: Memory bandwidth.
        links: Total bandwidth of the fast links of this chip, to the other `linked` chips.
        linked: The number of chips connected by fast links, including this one.
        network: Bandwidth to all other chips: this chip's share of the network adapters of its host.
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
        """Return the peak FLOP/s of matrix products of a data type. Types wider than bfloat16 count as bfloat16."""
        return self.float8 or self.bfloat16 if dtype.startswith("float8") else self.bfloat16


# Data sheets add up both directions of a link; the numbers here are for one. GPUs are on HGX boards of eight with one
# network adapter each; TPU links connect all chips of a pod.
CHIPS = {
    # NVIDIA A100 data sheet (SXM, 80 GB): NVLink 600 GB/s. DGX A100: adapters of 200 Gbit/s.
    "a100": Chip("A100", 312 * T, None, 80 * GB, 2.039e12, 300 * GB, 8, 25 * GB),
    # NVIDIA H100 data sheet (SXM): NVLink 900 GB/s. DGX H100: adapters of 400 Gbit/s.
    "h100": Chip("H100", 989 * T, 1979 * T, 80 * GB, 3.35e12, 450 * GB, 8, 50 * GB),
    # NVIDIA H200 data sheet (SXM).
    "h200": Chip("H200", 989 * T, 1979 * T, 141 * GB, 4.8e12, 450 * GB, 8, 50 * GB),
    # NVIDIA DGX B200 data sheet, divided by eight chips: 1,440 GB, 64 TB/s, 72 PFLOP/s of float8, NVLink 14.4 TB/s.
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


def current_chip() -> Chip | None:
    """Return the chip of the first device, or None if it has no data sheet here."""
    kind = jax.devices()[0].device_kind.lower()
    return next((chip for chip in CHIPS.values() if chip.kind.lower() in kind), None)


@cache
def device_peak_flops() -> float:
    """Return the peak FLOP/s of one device: from a data sheet, or else measured with a float32 matrix product."""
    if (chip := current_chip()) is not None:
        return chip.bfloat16
    matmul, matrix = jax.jit(jnp.dot), np.ones((1024, 1024), np.float32)
    seconds = timeit.repeat(lambda: matmul(matrix, matrix).block_until_ready(), number=1, repeat=4)
    # The first call, which compiles, is never the fastest.
    return 2 * len(matrix) ** 3 / min(seconds)


# The devices of this machine, found without initializing JAX on a CPU.

MEMORY = Path("/proc/meminfo")
# In a container, the root of the cgroup hierarchy is the cgroup of the process.
CONTROL_GROUP = Path("/sys/fs/cgroup")
ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin", "libtpu")


@dataclass(frozen=True)
class Machine:
    """The devices of a machine, each with `memory` free bytes and `flops` peak FLOP/s (0 if unknown)."""

    platform: str
    n_devices: int
    memory: float
    flops: float


def detect_machine() -> Machine:
    """Return the devices of this machine without initializing JAX on a CPU, whose cores are devices by default."""
    if not any(find_spec(plugin) for plugin in ACCELERATOR_PLUGINS) or jax.default_backend() == "cpu":
        n_devices = _devices_in_xla_flags() or count_cores()
        return Machine("cpu", n_devices, free_memory() / n_devices, 0.0)
    return query_machine()


def query_machine() -> Machine:
    """Return the devices of this process and their memory, initializing JAX. CPU devices share main memory."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return Machine("cpu", len(devices), free_memory() / len(devices), 0.0)
    return Machine(devices[0].platform, len(devices), free_device_memory(devices[0]), device_peak_flops())


def use_cpu_devices(count: int) -> None:
    """Split the CPU into this many devices, unless XLA_FLAGS does or JAX is already in use, as in a notebook."""
    # JAX raises RuntimeError once it has opened its devices.
    with contextlib.suppress(RuntimeError):
        if _devices_in_xla_flags() is None:
            jax.config.update("jax_num_cpu_devices", count)


def _devices_in_xla_flags() -> int | None:
    """Return the number of CPU devices that XLA_FLAGS sets, or None."""
    counts = re.findall(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(counts[-1]) if counts else None


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_device_memory(device: jax.Device) -> int:
    """Return the bytes of free memory of a device; on a CPU, those of the host."""
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", free_memory()) - statistics.get("bytes_in_use", 0)


def free_memory() -> int:
    """Return the bytes of main memory that this process can still allocate, given its system, cgroup and limits.

    On systems other than Linux, this is the total memory.
    """
    if not MEMORY.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":") for line in MEMORY.read_text(encoding="ascii").splitlines())
    return max(0, min(int(fields["MemAvailable"].split()[0]) * 1024, _free_in_cgroup(), _free_address_space()))


def _free_in_cgroup() -> int:
    """Return the free bytes in the cgroup of this process, such as that of a container or a cluster job."""
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((CONTROL_GROUP / name).read_text() for name in ("memory.max", "memory.current"))
        # The page cache can be reclaimed, including its active part.
        statistics = (CONTROL_GROUP / "memory.stat").read_text()
        file_cache = re.findall(r"^(?:in)?active_file (\d+)$", statistics, re.MULTILINE)
        return int(limit) - int(used) + sum(map(int, file_cache))
    return sys.maxsize


def _free_address_space() -> int:
    """Return the free bytes of address space under `ulimit -v`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return limit - pages * os.sysconf("SC_PAGE_SIZE")


# Data types for model.dtype='auto'.

# CPU features with instructions that multiply bfloat16 numbers.
BFLOAT16_FEATURES = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")
# Used on CPUs with such instructions, where model.dtype='bfloat16' would be slower (docs/performance.md).
BFLOAT16_MATMULS = {"model.precision.matmul_dtype": "bfloat16", "model.precision.logits_dtype": "bfloat16"}


def resolve_auto_dtype(
    values: dict[str, Any], overrides: dict[str, Any], origins: dict[str, str], platform: str | None = None
) -> None:
    """Replace model.dtype='auto' by the data types that suit a platform. Others that the user has set are kept.

    Args:
        values: The values of a config by dotted path; modified in place.
        overrides: Values that replace them; modified in place.
        origins: The origin of each value; modified in place.
        platform: cpu, gpu or tpu; None for the default backend of JAX.
    """
    platform = platform or jax.default_backend()
    for path, value in preferred_dtypes(platform).items():
        if path == "model.dtype" or origins.get(path) == "base":
            (overrides if path in overrides else values)[path] = value
            origins[path] = f"auto, for a {platform}"


def preferred_dtypes(platform: str) -> dict[str, str]:
    """Return data types by field: bfloat16 on accelerators; float32 on CPUs, with bfloat16 products if fast."""
    if platform != "cpu":
        return {"model.dtype": "bfloat16"}
    return {"model.dtype": "float32"} | (BFLOAT16_MATMULS if BFLOAT16_FEATURES.search(_read_cpuinfo()) else {})


def _read_cpuinfo() -> str:
    """Return /proc/cpuinfo, or '' on systems other than Linux."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
