"""What a run runs in, as far as it can change a run's bits: Python, packages, devices, processor, settings.

Nothing of it tells who runs it, or where: no user, no host, no path, and of the variables only those listed here.
"""

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

# Environment variables to record: those that affect what JAX, XLA and the underlying libraries compute, or how. Other
# variables, whatever their prefix, may hold secrets.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH",
    "JAX_DEBUG_INFS",
    "JAX_DEBUG_NANS",
    "JAX_DEFAULT_DTYPE_BITS",
    "JAX_DISABLE_JIT",
    "JAX_ENABLE_CHECKS",
    "JAX_NUMPY_RANK_PROMOTION",
    "JAX_PLATFORMS",
    "JAX_PLATFORM_NAME",
    "JAX_RANDOM_SEED_OFFSET",
    "JAX_USE_SHARDY_PARTITIONER",
    "LIBTPU_INIT_ARGS",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_BUFFSIZE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_MAX_CTAS",
    "NCCL_MAX_NCHANNELS",
    "NCCL_MIN_CTAS",
    "NCCL_MIN_NCHANNELS",
    "NCCL_NTHREADS",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NVIDIA_TF32_OVERRIDE",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "ROCR_VISIBLE_DEVICES",
    "TPU_CHIPS_PER_PROCESS_BOUNDS",
    "TPU_MEGACORE",
    "TPU_PROCESS_BOUNDS",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)
# Variables that hold lists of flags. Only flags are kept, and none that name files or folders: such paths may identify
# the user, be written to, or make XLA run a program stored there.
OF_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
FLAG = re.compile(r"--(?P<name>\w+)(=[^/\\\"']*)?")
FILE_FLAG = re.compile(r"(^|_)(dir|path|file|filename|to|from|dump)(_|$)")
# Which devices there are to be seen is this machine's matter.
OF_THIS_MACHINE = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# So many devices a CPU is taken for. It is recorded as the count of devices, however it was said.
CPU_DEVICES, CPU_DEVICES_FLAG = "JAX_NUM_CPU_DEVICES", "--xla_force_host_platform_device_count="
# Settings of JAX that change what is computed.
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_most_optimizations",
)
OURS = "rustgpt_jax"
DRIVER = Path("/proc/driver/nvidia/version")


def collect_environment() -> dict[str, Any]:
    """Versions, devices and settings of this process, ready for JSON. JAX is started if it is not yet."""
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "packages": installed_packages(),
        "machine": _machine(),
        "devices": _devices(),
        "settings": _settings(),
        "variables": filter_variables(os.environ),
    }


def flatten_environment(environment: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An environment with a name for each value: {'packages.jax': '0.10.2', ...}."""
    values: dict[str, Any] = {}
    for name, value in environment.items():
        values |= flatten_environment(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def environment_variables(environment: Mapping[str, Any], n_devices: int) -> dict[str, str]:
    """The variables that give a process the settings of an environment; those of this process that it lacks are gone.

    A CPU is so many devices; others are those that this process may see.
    """
    replaced = {*VARIABLES, CPU_DEVICES, *(name.upper() for name in SETTINGS)} - {*OF_THIS_MACHINE}
    stays = {name: value for name, value in os.environ.items() if name not in replaced}
    settings = {
        name.upper(): str(value) for name, value in environment.get("settings", {}).items() if value is not None
    }
    recorded = {name: value for name, value in environment.get("variables", {}).items() if name not in OF_THIS_MACHINE}
    devices = {CPU_DEVICES: str(n_devices)} if environment.get("devices", {}).get("backend") == "cpu" else {}
    return stays | settings | filter_variables(recorded) | devices


def filter_variables(values: Mapping[str, str]) -> dict[str, str]:
    """The variables that are recorded, in order. What they say of settings and devices is recorded with these."""
    kept = {name: values[name] for name in VARIABLES if name in values}
    kept |= {name: _flags(kept[name]) for name in OF_FLAGS if name in kept}
    return {name: value for name, value in kept.items() if value or name in OF_THIS_MACHINE}


def _flags(text: str) -> str:
    """Return the flags of a list that are recorded."""
    flags = [(flag, FLAG.fullmatch(flag)) for flag in text.split() if not flag.startswith(CPU_DEVICES_FLAG)]
    return " ".join(flag for flag, match in flags if match and not FILE_FLAG.search(match["name"]))


@cache
def installed_packages() -> dict[str, str]:
    """The version of each installed package but ours, whose code each run keeps.

    One that is installed from its sources, to be edited, says so.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name, version = _name_and_version(distribution)
        # The first of a name is the one that is imported.
        if name and name not in {OURS, *found}:
            about = distribution.read_text("direct_url.json") or ""
            found[name] = version + (" (editable)" if '"editable": true' in about else "")
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _name_and_version(distribution: metadata.Distribution) -> tuple[str, str]:
    """Those of a package, from the head of its description: to parse all of each takes a quarter of a second."""
    head = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
    fields = dict(line.split(": ", 1) for line in head.splitlines() if line.startswith(("Name: ", "Version: ")))
    return fields.get("Name", "").strip(), fields.get("Version", "").strip()


@cache
def _machine() -> dict[str, Any]:
    model, features = _processor()
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "processor": model,
        "processor_features": features,
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> tuple[str, str]:
    """The name of the processor, and a hash of what it can do: XLA compiles for that."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = " ".join(sorted((fields.get("flags") or fields.get("Features") or "").split()))
    return fields.get("model name") or platform.processor(), hashlib.sha256(features.encode()).hexdigest()[:12]


def _settings() -> dict[str, Any]:
    # Import here so that reading a run or a sweep does not load JAX.
    import jax

    return {name: jax.config.values[name] for name in SETTINGS}


def _devices() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    kinds = [device.device_kind for device in devices]
    return {
        "backend": jax.default_backend(),
        "count": len(devices),
        "processes": jax.process_count(),
        "kinds": sorted(set(kinds)),
        "platform_version": " ".join(devices[0].client.platform_version.split()),
        "driver": DRIVER.read_text().splitlines()[0] if DRIVER.exists() else None,
    }
