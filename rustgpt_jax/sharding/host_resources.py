"""What a sweep is planned for: the devices here, their free memory and their speed, without starting JAX on a CPU."""

import contextlib
import os
import re
import resource
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax

from rustgpt_jax.sharding.peak_flops import device_peak_flops

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
