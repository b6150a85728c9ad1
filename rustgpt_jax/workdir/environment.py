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
from typing import Any, NamedTuple

from rustgpt_jax.atomic_io import write_atomically
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.jax_internals import record_cache_keys
from rustgpt_jax.workdir.run_dir import RunDir

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


# Fingerprints of compiled programs, and the autotuning cache of a run.
#
# XLA selects GPU kernels by timing them, so two compilations of one program may give different bits. A run keeps these
# selections in its folder; with them it is compiled in the same way again.

DUMP, LOAD = "--xla_gpu_dump_autotune_results_to=", "--xla_gpu_load_autotune_results_from="
MODULE_NAME = re.compile(r"^module @(?P<name>\w+)", re.MULTILINE)

# The cache keys of the programs that this process has compiled, by the hash of the program.
_keys: dict[str, str] = {}


class Program(NamedTuple):
    """SHA-256 of a program's StableHLO, without names of files and lines, and its key in JAX's persistent cache.

    The key is None if that cache is turned off.
    """

    stablehlo: str
    cache_key: str | None


def call_and_fingerprint(function: Any, *arguments: Any) -> tuple[Any, Program]:
    """Call a jitted function for the first time, and fingerprint its program. It is traced once.

    Returns:
        The function's result, and its program.
    """
    lowered = function.lower(*arguments).as_text()
    stablehlo = hashlib.sha256(lowered.encode()).hexdigest()
    with record_cache_keys() as keys:
        result = function(*arguments)
    module = MODULE_NAME.search(lowered)
    own_keys = [key for key in keys if module and key.startswith(f"{module['name']}-")]
    if own_keys:
        _keys[stablehlo] = own_keys[-1]
    return result, Program(stablehlo, _keys.get(stablehlo))


# What a GPU's compiler chose.


def enable_autotune_cache(run: RunDir) -> None:
    """Have XLA write what it chooses by timing for a run, and choose as before where it has.

    To be called before JAX is used: XLA reads its flags once. Flags that the user has set stay as they are. The names
    of the files are part of the keys of JAX's cache, so that each run compiles its programs itself once: a program that
    comes out of the cache makes no choices that could be written down.
    """
    if _may_choose():
        dumped = _dumped(run)
        dumped.parent.mkdir(parents=True, exist_ok=True)
        _add_flags(f"{DUMP}{dumped}", *_loading(run))


def load_autotuning(run: RunDir) -> None:
    """Have XLA choose as it did for a run, and write nothing: for what makes steps of the run again.

    To be called before JAX is used. Trials of sweeps have no choices kept: one process chooses for many of them.
    """
    if _may_choose():
        _add_flags(*_loading(run))


def save_autotune_cache(run: RunDir) -> None:
    """Keep in a run's folder what XLA has chosen by now, if it has."""
    dumped = _dumped(run)
    if f"{DUMP}{dumped}" in os.environ.get("XLA_FLAGS", "").split() and dumped.exists():
        write_atomically(run.autotune_file, _compiler() + dumped.read_text())


def _may_choose() -> bool:
    """Whether there is a GPU, and the user has said nothing of its choices."""
    given = os.environ.get("XLA_FLAGS", "")
    return DRIVER.exists() and DUMP not in given and LOAD not in given


def _loading(run: RunDir) -> list[str]:
    is_known = run.autotune_file.exists() and run.autotune_file.read_text().startswith(_compiler())
    return [f"{LOAD}{run.autotune_file.absolute()}"] if is_known else []


def _add_flags(*flags: str) -> None:
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *flags])


def _dumped(run: RunDir) -> Path:
    """Where XLA writes, anew at each compilation. Beside JAX's cache, so that what has programs has their choices."""
    place = hashlib.sha256(str(run.path.absolute()).encode()).hexdigest()[:16]
    # By the suffix XLA writes text.
    return (cache_folder() / "autotune" / f"{place}.textproto").absolute()


def _compiler() -> str:
    """The first line of a file of choices: XLA refuses those of another version of itself."""
    return f"# jaxlib {metadata.version('jaxlib')}\n"
