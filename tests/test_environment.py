"""The environment of a run: recorded completely, quickly and anonymously, and passed on to another process."""

import json
import os
import platform
import socket
import string
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import hypothesis
import jax
import pytest
from hypothesis import given
from hypothesis import strategies as some

from rustgpt_jax.workdir import environment as environments
from rustgpt_jax.workdir.environment import (
    collect_environment,
    environment_variables,
    filter_variables,
    flatten_environment,
    installed_packages,
)

ROOT = Path(__file__).parent.parent
SECRET = "swordfish"


def test_environment_has_versions_devices_and_settings() -> None:
    values = flatten_environment(json.loads(json.dumps(collect_environment())))
    assert values["python.version"] == platform.python_version()
    assert values["packages.jax"] == metadata.version("jax") == jax.__version__
    assert values["packages.numpy"] == metadata.version("numpy")
    assert values["machine.cores"] == len(os.sched_getaffinity(0))
    assert values["devices.backend"] == "cpu" and values["devices.count"] == jax.device_count()
    assert values["devices.driver"] is None or "NVIDIA" in values["devices.driver"]
    assert values["settings.jax_default_prng_impl"] == "threefry2x32"
    assert values["variables.JAX_NUMPY_RANK_PROMOTION"] == "raise"
    assert len(values["machine.processor"]) > 2


def test_collecting_the_environment_is_fast() -> None:
    collect_environment()
    began = time.perf_counter()
    collect_environment()
    assert time.perf_counter() - began < 0.05


def test_environment_does_not_identify_user_or_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_SECRET_FILE", "JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/home/{SECRET} --xla_gpu_autotune_level=0")
    text = json.dumps(collect_environment())
    assert SECRET not in text and socket.gethostname() not in text
    assert str(Path.home()) + "/" not in text and str(ROOT) not in text
    assert collect_environment()["variables"]["XLA_FLAGS"] == "--xla_gpu_autotune_level=0"


NAMES = some.sampled_from(["JAX_", "XLA_", "NVIDIA_", "CUDA_", "NCCL_", "TPU_", ""]).flatmap(
    lambda prefix: some.text(string.ascii_uppercase + "_", min_size=1, max_size=12).map(prefix.__add__)
) | some.sampled_from(environments.VARIABLES)


@given(some.dictionaries(NAMES, some.just(SECRET)))
@hypothesis.settings(max_examples=100)
def test_only_listed_variables_are_recorded(values: dict[str, str]) -> None:
    others = {"HOME": "a", "JAX_PASSPHRASE": "b", "NVIDIA_NGC_CRED": "c", "CUDA_API_AUTH": "d", "JAX_API_TOKEN": "e"}
    listed = {name: values[name] for name in environments.VARIABLES if name in values}
    without_flags = {name: value for name, value in listed.items() if name not in environments.FLAG_VARIABLES}
    assert filter_variables(values | others) == without_flags


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0",) * 2,
        ("--xla_gpu_enable_latency_hiding_scheduler",) * 2,
        ("--xla_gpu_cuda_data_dir=elsewhere --xla_gpu_autotune_level=0", "--xla_gpu_autotune_level=0"),
        ("--xla_anything=/tmp/programs", ""),
        ("--xla_dump_to=here", ""),
        ("--xla_gpu_ptx_file=mine.ptx", ""),
        ("flags.txt", ""),
        ("--xla_force_host_platform_device_count=8", ""),
    ],
)
def test_flags_with_file_names_are_neither_recorded_nor_passed_on(flags: str, kept: str) -> None:
    """XLA runs programs from folders that some flags name."""
    assert filter_variables({"XLA_FLAGS": flags}).get("XLA_FLAGS", "") == kept
    recorded = json.loads(json.dumps(collect_environment())) | {
        "variables": {"XLA_FLAGS": flags, "LD_PRELOAD": "evil.so"}
    }
    given = environment_variables(recorded, n_devices=1)
    assert given.get("XLA_FLAGS", "") == kept and "LD_PRELOAD" not in given


def test_package_version_is_that_of_the_imported_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, version in (("first", "9.9"), ("second", "8.8")):
        about = tmp_path / folder / "numpy-0.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: numpy\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    installed_packages.cache_clear()
    try:
        assert installed_packages()["numpy"] == "9.9"
    finally:
        installed_packages.cache_clear()


REPORT = """
import json
from rustgpt_jax.workdir.environment import collect_environment
print(json.dumps(collect_environment()))
"""


def test_recorded_settings_apply_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = json.loads(json.dumps(collect_environment()))
    wanted["settings"] |= {
        "jax_enable_x64": True,
        "jax_default_matmul_precision": "highest",
        "jax_default_prng_impl": "rbg",
        "jax_disable_most_optimizations": True,
    }
    wanted["variables"] = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    # Settings of this process are not passed on, except for visible devices and cache folders.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    monkeypatch.setenv("JAX_DEBUG_NANS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    given = environment_variables(wanted, n_devices=2)
    assert given["JAX_COMPILATION_CACHE_DIR"] == "somewhere"
    shown = subprocess.run([sys.executable, "-c", REPORT], env=given, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["settings"] == wanted["settings"]
    # Recorded once, however it was set.
    assert found["devices"]["count"] == 2
    assert not {"XLA_FLAGS", "JAX_NUM_CPU_DEVICES"} & found["variables"].keys()
    wanted["devices"]["backend"] = "gpu"
    assert "JAX_NUM_CPU_DEVICES" not in environment_variables(wanted, n_devices=2)
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert "JAX_DEBUG_NANS" not in found["variables"] and "JAX_ENABLE_X64" not in found["variables"]
