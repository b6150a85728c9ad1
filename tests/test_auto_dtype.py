"""dtype='auto': the selected data types are recorded in the run's config, and types set by the user are kept."""

from pathlib import Path

import pytest
from test_cli import TINY, launch

from rustgpt_jax.config.schema import FIELDS
from rustgpt_jax.sharding import hardware_specs
from rustgpt_jax.sharding.hardware_specs import preferred_dtypes, resolve_auto_dtype
from rustgpt_jax.workdir.run_dir import load_config

FACTORS = {"model.precision.matmul_dtype": "bfloat16", "model.precision.logits_dtype": "bfloat16"}
AUTO = "--config.model.dtype=auto"


@pytest.mark.parametrize(
    ("platform", "processor", "expected"),
    [
        ("gpu", "avx512_bf16", {"model.dtype": "bfloat16"}),
        ("tpu", "", {"model.dtype": "bfloat16"}),
        ("cpu", "flags : avx2 avx512_bf16 avx512_vnni", {"model.dtype": "float32"} | FACTORS),
        ("cpu", "Features : asimd bf16 i8mm", {"model.dtype": "float32"} | FACTORS),
        ("cpu", "flags : avx2 avx512f", {"model.dtype": "float32"}),
        ("cpu", "", {"model.dtype": "float32"}),
    ],
)
def test_preferred_dtypes(
    platform: str, processor: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware_specs, "_read_cpuinfo", lambda: processor)
    assert preferred_dtypes(platform) == expected


def test_dtypes_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_specs, "_read_cpuinfo", lambda: "avx512_bf16")
    values, overrides = {"model.dtype": "auto", "model.d_ff": 8}, {"model.precision.matmul_dtype": "float32"}
    origins = dict.fromkeys(FIELDS, "base") | {"model.precision.matmul_dtype": "command line", "model.dtype": "mine.py"}
    resolve_auto_dtype(values, overrides, origins, "cpu")
    assert overrides == {"model.precision.matmul_dtype": "float32"}
    assert values == {"model.dtype": "float32", "model.d_ff": 8, "model.precision.logits_dtype": "bfloat16"}
    changed = {path for path, origin in origins.items() if origin == "auto, for a cpu"}
    assert (
        changed == {"model.dtype", "model.precision.logits_dtype"}
        and origins["model.precision.matmul_dtype"] == "command line"
    )


@pytest.mark.parametrize("says", ["{}", "{'model': 3}", "{'model': {'n_layers': 2}}"])
def test_config_without_dtype_is_rejected(says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def get_config():\n    return {says}\n")
    refused = launch("explain", "--config=mine.py", cwd=tmp_path, code=2)
    assert refused.stderr.startswith("error: config.") and "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.long
def test_resolved_dtype_is_recorded(tmp_path: Path) -> None:
    command = ("train", TINY, AUTO, f"--run={tmp_path / 'run'}", "--config.training.steps=2")
    first = launch(*command, "--config.schedule.warmup_steps=1", cwd=tmp_path)
    assert "Done" in first.stdout
    assert load_config(tmp_path / "run").model.dtype == "float32"
    assert "is complete" in launch(*command, "--config.schedule.warmup_steps=1", cwd=tmp_path).stdout


@pytest.mark.parametrize("others", ["--launcher=slurm", "--num_processes=2"])
def test_other_platform_does_not_query_the_device(others: str, tmp_path: Path) -> None:
    refused = launch("train", TINY, AUTO, others, cwd=tmp_path, code=2)
    assert "config.model.dtype='auto' depends on the device of this process" in refused.stderr
    assert list(tmp_path.iterdir()) == []
