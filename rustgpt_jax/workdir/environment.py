"""The parts of a run's environment that can affect results: packages, devices, settings, and compiled programs.

The record does not identify the user: it has no user name, host name or path, and only the environment variables listed
here.
"""

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.jax_internals import record_cache_keys
from rustgpt_jax.workdir.run_dir import RunDir

# Environment variables to record: those that affect what JAX, XLA and the underlying libraries compute, or how. Other
# variables, whatever their prefix, may hold secrets.
VARIABLES = (
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING"),
    *("CUDA_MODULE_LOADING", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "JAX_CPU_COLLECTIVES_IMPLEMENTATION"),
    *("JAX_CPU_ENABLE_ASYNC_DISPATCH", "JAX_DEBUG_INFS", "JAX_DEBUG_NANS", "JAX_DEFAULT_DTYPE_BITS"),
    *("JAX_DISABLE_JIT", "JAX_ENABLE_CHECKS", "JAX_NUMPY_RANK_PROMOTION", "JAX_PLATFORMS", "JAX_PLATFORM_NAME"),
    *("JAX_RANDOM_SEED_OFFSET", "JAX_USE_SHARDY_PARTITIONER", "LIBTPU_INIT_ARGS", "MKL_NUM_THREADS", "NCCL_ALGO"),
    *("NCCL_BUFFSIZE", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_MAX_CTAS", "NCCL_MAX_NCHANNELS", "NCCL_MIN_CTAS"),
    *("NCCL_MIN_NCHANNELS", "NCCL_NTHREADS", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"),
    *("NCCL_PROTO", "NCCL_SHM_DISABLE", "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "ROCR_VISIBLE_DEVICES", "TPU_CHIPS_PER_PROCESS_BOUNDS"),
    *("TPU_MEGACORE", "TPU_PROCESS_BOUNDS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_ALLOCATOR"),
    *("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"),
)
# Variables that hold lists of flags. Only flags are kept, and none that name files or folders: such paths may identify
# the user, be written to, or make XLA run a program stored there.
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
FLAG = re.compile(r"--(?P<name>\w+)(=[^/\\\"']*)?")
FILE_FLAG = re.compile(r"(^|_)(dir|path|file|filename|to|from|dump)(_|$)")
# The visible devices depend on the machine, so these variables are not passed to a rerun.
MACHINE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# The number of virtual CPU devices, which is recorded as the device count.
CPU_DEVICES, CPU_DEVICES_FLAG = "JAX_NUM_CPU_DEVICES", "--xla_force_host_platform_device_count="
# JAX settings that affect results.
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_most_optimizations",
)
DRIVER = Path("/proc/driver/nvidia/version")


def collect_environment() -> dict[str, Any]:
    """Return the versions, devices and settings of this process as JSON values. This initializes JAX."""
    # Import here so that reading a run or a sweep does not load JAX.
    import jax

    devices = jax.devices()
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "packages": installed_packages(),
        "machine": _machine(),
        "devices": {
            "backend": jax.default_backend(),
            "count": len(devices),
            "processes": jax.process_count(),
            "kinds": sorted({device.device_kind for device in devices}),
            "platform_version": " ".join(devices[0].client.platform_version.split()),
            "driver": DRIVER.read_text().splitlines()[0] if DRIVER.exists() else None,
        },
        "settings": {name: jax.config.values[name] for name in SETTINGS},
        "variables": filter_variables(os.environ),
    }


def flatten_environment(environment: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten an environment to dotted names: {'packages.jax': '0.10.2', ...}."""
    values: dict[str, Any] = {}
    for name, value in environment.items():
        values |= flatten_environment(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def environment_variables(environment: Mapping[str, Any], n_devices: int) -> dict[str, str]:
    """Return the variables of this process, with those that affect results taken from a recorded environment.

    Args:
        environment: The result of `collect_environment`.
        n_devices: The number of virtual devices, if the environment is a CPU. Accelerators are those visible here.
    """
    replaced = {*VARIABLES, CPU_DEVICES, *(name.upper() for name in SETTINGS)} - {*MACHINE_VARIABLES}
    unchanged = {name: value for name, value in os.environ.items() if name not in replaced}
    settings = {
        name.upper(): str(value) for name, value in environment.get("settings", {}).items() if value is not None
    }
    recorded = {
        name: value for name, value in environment.get("variables", {}).items() if name not in MACHINE_VARIABLES
    }
    devices = {CPU_DEVICES: str(n_devices)} if environment.get("devices", {}).get("backend") == "cpu" else {}
    return unchanged | settings | filter_variables(recorded) | devices


def filter_variables(values: Mapping[str, str]) -> dict[str, str]:
    """Return the recorded variables in order, without flags that the settings and devices already cover."""
    kept = {name: values[name] for name in VARIABLES if name in values}
    kept |= {name: _filter_flags(kept[name]) for name in FLAG_VARIABLES if name in kept}
    return {name: value for name, value in kept.items() if value or name in MACHINE_VARIABLES}


def _filter_flags(text: str) -> str:
    """Drop the flags that are not recorded."""
    flags = [(flag, FLAG.fullmatch(flag)) for flag in text.split() if not flag.startswith(CPU_DEVICES_FLAG)]
    return " ".join(flag for flag, match in flags if match and not FILE_FLAG.search(match["name"]))


@cache
def installed_packages() -> dict[str, str]:
    """Return the version of each installed package except this one, whose code is saved with each run.

    Editable installs are marked.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # Parsing the whole metadata of all packages takes a quarter of a second.
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        lines = text.partition("\n\n")[0].splitlines()
        fields = dict(line.split(": ", 1) for line in lines if line.startswith(("Name: ", "Version: ")))
        name, version = fields.get("Name", "").strip(), fields.get("Version", "").strip()
        # If several have the same name, the first is imported.
        if name and name not in {"rustgpt_jax", *found}:
            about = distribution.read_text("direct_url.json") or ""
            found[name] = version + (" (editable)" if '"editable": true' in about else "")
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


@cache
def _machine() -> dict[str, Any]:
    # XLA compiles for the features of the processor.
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = " ".join(sorted((fields.get("flags") or fields.get("Features") or "").split()))
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "processor": fields.get("model name") or platform.processor(),
        "processor_features": hashlib.sha256(features.encode()).hexdigest()[:12],
        "cores": len(os.sched_getaffinity(0)),
    }


# Fingerprints of compiled programs.

DUMP, LOAD = "--xla_gpu_dump_autotune_results_to=", "--xla_gpu_load_autotune_results_from="
MODULE_NAME = re.compile(r"^module @(?P<name>\w+)", re.MULTILINE)

# Cache keys of the programs that this process has compiled, by the hash of the program.
_cache_keys: dict[str, str] = {}


class Program(NamedTuple):
    """The fingerprint of a compiled program.

    Attributes:
        stablehlo: The SHA-256 of its StableHLO, without source locations.
        cache_key: Its key in JAX's persistent compilation cache, or None if the cache is disabled.
    """

    stablehlo: str
    cache_key: str | None


def call_and_fingerprint(function: Any, *arguments: Any) -> tuple[Any, Program]:
    """Call a jitted function for the first time.

    Returns:
        The result, and the fingerprint of the program.
    """
    lowered = function.lower(*arguments).as_text()
    stablehlo = hashlib.sha256(lowered.encode()).hexdigest()
    with record_cache_keys() as keys:
        result = function(*arguments)
    module = MODULE_NAME.search(lowered)
    own_keys = [key for key in keys if module and key.startswith(f"{module['name']}-")]
    if own_keys:
        _cache_keys[stablehlo] = own_keys[-1]
    return result, Program(stablehlo, _cache_keys.get(stablehlo))


# XLA's autotuning results.
#
# XLA selects GPU kernels by timing them, so two compilations of one program may give different bits. A run keeps these
# selections in its folder and reuses them for later compilations.


def enable_autotune_cache(run: RunDir) -> None:
    """Set XLA flags to save a run's autotuning results and reuse earlier ones.

    Call this before JAX is used, since XLA reads its flags once. Flags set by the user are kept. The file names are
    part of the keys of JAX's compilation cache, so each run compiles its programs once: XLA does not autotune cached
    programs.
    """
    if _can_set_autotune_flags():
        dump = _autotune_dump(run)
        dump.parent.mkdir(parents=True, exist_ok=True)
        _add_xla_flags(f"{DUMP}{dump}", *_load_flags(run))


def load_autotuning(run: RunDir) -> None:
    """Set XLA flags to reuse a run's autotuning results when its steps are recomputed.

    Call this before JAX is used. Trials of sweeps have no saved results, since one process compiles for many of them.
    """
    if _can_set_autotune_flags():
        _add_xla_flags(*_load_flags(run))


def save_autotune_cache(run: RunDir) -> None:
    """Save XLA's autotuning results so far, if there are any, in the run folder."""
    dump = _autotune_dump(run)
    if f"{DUMP}{dump}" in os.environ.get("XLA_FLAGS", "").split() and dump.exists():
        write_atomically(run.autotune_file, _version_line() + dump.read_text())


def _can_set_autotune_flags() -> bool:
    """Return whether there is a GPU and the user has not set the flags."""
    given = os.environ.get("XLA_FLAGS", "")
    return DRIVER.exists() and DUMP not in given and LOAD not in given


def _load_flags(run: RunDir) -> list[str]:
    is_usable = run.autotune_file.exists() and run.autotune_file.read_text().startswith(_version_line())
    return [f"{LOAD}{run.autotune_file.absolute()}"] if is_usable else []


def _add_xla_flags(*flags: str) -> None:
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *flags])


def _autotune_dump(run: RunDir) -> Path:
    """Return the file that XLA rewrites at each compilation, next to JAX's cache so that both are deleted together."""
    name = hashlib.sha256(str(run.path.absolute()).encode()).hexdigest()[:16]
    # The suffix makes XLA write text.
    return (cache_folder() / "autotune" / f"{name}.textproto").absolute()


def _version_line() -> str:
    """Return the header line of a saved autotuning cache. XLA rejects caches from other versions."""
    return f"# jaxlib {metadata.version('jaxlib')}\n"
