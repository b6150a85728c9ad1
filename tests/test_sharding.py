"""Meshes of 8 virtual devices: the results of one device, with only the expected collectives."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import small_config
from jax.sharding import PartitionSpec

from rustgpt_jax.config.schema import partition
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.activation_sharding import partition_spec
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.model.layers import NORMS
from rustgpt_jax.model.mixers import MIXERS
from rustgpt_jax.model.mlps import FEEDFORWARDS
from rustgpt_jax.model.positions import POSITIONS
from rustgpt_jax.model.presets import FAMILIES
from rustgpt_jax.pytrees import flatten_paths
from rustgpt_jax.sharding.sharding_plan import RULES, axis_sizes, check_batch_shards, min_devices, partition_spec_for
from rustgpt_jax.training.optimizers import OPTIMIZERS
from rustgpt_jax.training.train_step import init_state

MESH = {"data": 2, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}


# The collectives of each mesh.

EXPECTED = {
    "data 8": {"all-reduce data"},
    # Embeddings are looked up in shards of channels, and exchanged for shards of rows.
    "fsdp 8": {"all-gather fsdp", "all-reduce fsdp", "all-to-all fsdp"},
    "tensor 4": {"all-reduce tensor", "all-reduce data"},
    # The rows of each microbatch, and of the embeddings of its tokens, are resharded.
    "fsdp 2 x tensor 2": {"all-gather", "all-reduce", "all-to-all", "collective-permute"},
    "expert 4": {"all-to-all expert", "all-reduce"},
    "dropless expert 2 x tensor 2": {"all-gather expert", "all-reduce"},
    "context 4": {"all-gather context", "all-reduce"},
}


LONG_CASES = {"data 8", "fsdp 8", "tensor 4", "context 4", "expert 4", "dropless expert 2 x tensor 2"}
CASES = [pytest.param(case, marks=[pytest.mark.long] if case in LONG_CASES else []) for case in EXPECTED]


def run_cases(folder: Path, n_processes: int = 1, cases: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run some or all cases on 8 devices in some processes, and return the results of each process."""
    tests = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": f"{tests.parent}:{tests}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // n_processes}",
        # This does not affect shardings or numbers, and compilation takes a third of the time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(tests / "mesh_cases.py"), str(folder), *cases]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    distributed = [[f"--distributed=127.0.0.1:{port},{n_processes},{index}"] for index in range(n_processes)]
    processes = [
        subprocess.Popen(
            [*command, *(flags if n_processes > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags in distributed
    ]
    printed = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(text.splitlines()[-1]) for text, _ in printed]


class Results(dict[str, Any]):
    """The results of each case on 8 devices of one process, computed on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, case: str) -> Any:
        self[case] = run_cases(self.folder, cases=[case])[0][case]
        return self[case]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("meshes"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_mesh(results: Results, case: str) -> None:
    assert_same_results(results, case)


@pytest.mark.slow
@pytest.mark.long
def test_results_do_not_depend_on_the_mesh_of_four_processes(tmp_path: Path) -> None:
    for results in run_cases(tmp_path, 4):
        for case in EXPECTED:
            assert_same_results(results, case)
            assert results[case]["restored"] == {"tensor 2": True, "fsdp 4": True}


def assert_same_results(results: dict[str, Any], case: str) -> None:
    """Check that initial parameters are bit-identical to one device, and losses and gradients differ by rounding."""
    assert results[case]["same_start"]
    alone, here = results[case]["losses"]
    assert len(alone) == 20 and alone[-1] < alone[0] - 0.1
    assert max(abs(one - other) for one, other in zip(alone, here, strict=True)) < 1e-5
    for path, difference in results[case]["gradients"].items():
        assert difference < 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_mesh_has_only_the_expected_collectives(results: Results, case: str) -> None:
    found = results[case]["collectives"]
    for name in found:
        assert any(name == expected or name.split()[0] == expected for expected in EXPECTED[case]), found
    for expected in EXPECTED[case]:
        assert any(name.startswith(expected) for name in found), found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_devices_gather_at_most_one_layer(results: Results, case: str) -> None:
    shapes = {path: whole for path, (whole, _) in results[case]["shards"].items() if path.startswith("params")}
    largest = max(math.prod(shape[1:] if path.startswith("params/blocks") else shape) for path, shape in shapes.items())
    assert results[case]["largest_gather"] <= 4 * largest


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_checkpoint_restores_on_other_meshes(results: Results, case: str) -> None:
    assert results[case]["restored"] == {"one device": True, "tensor 2": True, "fsdp 4": True}


@pytest.mark.slow
@pytest.mark.long
def test_optimizer_state_is_sharded_like_parameters(results: Results) -> None:
    shards = results["fsdp 8"]["shards"]
    for path, (whole, part) in shards.items():
        is_matrix = re.search("kernel|table", path)
        assert math.prod(whole) == math.prod(part) * (8 if is_matrix else 1), path
    moments = [path for path in shards if path.startswith("opt_state") and "kernel" in path]
    assert moments


# Partition rules.


def models() -> dict[str, Any]:
    """Return a model of every family and component."""
    base = {"model.bias": True, "model.vocab_size": 64, "model.attention.sinks": True, "model.tie_embeddings": False}
    found = {
        name: small_config(**{f"model.{knob}": value for knob, value in preset.items()}).model
        for name, preset in FAMILIES.items()
    }
    for name in MIXERS:
        for latent in (None, 8):
            own = {"model.mixers": (name,), "model.mla.q_lora_rank": latent}
            found[f"{name} {latent}"] = small_config(**base | own).model
    for table, knob in ((FEEDFORWARDS, "feedforwards"), (POSITIONS, "positions")):
        for name in table:
            found[name] = small_config(**base | {f"model.{knob}": (name,)}).model
    return found | {name: small_config(**base | {"model.norm": name}).model for name in NORMS}


def test_partition_rules_cover_all_parameters() -> None:
    used = set()
    for name, model in models().items():
        for path, leaf in flatten_paths(parameter_shapes(model)).items():
            rule = partition_spec_for(path, leaf.shape, MESH).rule
            assert rule is not None, (name, path)
            used.add(rule)
    assert used == set(range(len(RULES))), [RULES[index] for index in set(range(len(RULES))) - used]


def test_all_matrices_are_sharded() -> None:
    for name, model in models().items():
        for path, leaf in flatten_paths(parameter_shapes(model)).items():
            if re.search(r"kernel$|table$|(gate|up|down)$", path) and "convolution" not in path:
                axes = [axis for axis in partition_spec_for(path, leaf.shape, MESH).spec if axis]
                assert any(MESH[axis] > 1 for axis in axes), (name, path, leaf.shape)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_specs_match_parameter_specs(optimizer: str) -> None:
    config = small_config(**{"optimizer.name": optimizer})
    static, hparams = partition(config)
    leaves = flatten_paths(jax.eval_shape(lambda: init_state(static, hparams)))
    params = {path.removeprefix("params/"): leaf for path, leaf in leaves.items() if path.startswith("params/")}
    for path, leaf in leaves.items():
        own = next((name for name in params if path.endswith(name)), None)
        if own and leaf.shape == params[own].shape:
            assert partition_spec_for(path, leaf.shape, MESH) == partition_spec_for(own, leaf.shape, MESH), path


def test_custom_parameter_is_sharded_along_its_longest_axis() -> None:
    assert partition_spec_for("blocks/0/mixer/my_own", (2, 6, 8), MESH).spec == PartitionSpec(None, None, "fsdp")
    assert partition_spec_for("blocks/0/mixer/my_own", (2, 6, 7), MESH).spec == PartitionSpec(None, "fsdp", None)
    assert partition_spec_for("blocks/0/mixer/my_own", (3, 5, 7), MESH).spec == PartitionSpec(None, None, None)
    assert partition_spec_for("my_scale", (8,), MESH).spec == PartitionSpec(None)


def test_indivisible_axes_are_not_sharded() -> None:
    assert partition_spec_for("head/kernel", (6, 61), MESH).spec == PartitionSpec("fsdp", None)
    assert partition_spec("BTD", (4, 8, 8), MESH) == PartitionSpec(None, None, None)
    assert partition_spec("BTD", (8, 8, 8), MESH) == PartitionSpec(("data", "fsdp", "expert"), None, None)


def test_experts_are_sharded_over_the_expert_axis() -> None:
    assert partition_spec("BXPD", (8, 4, 3, 8), MESH) == PartitionSpec(("data", "fsdp"), "expert", None, None)


# The mesh.


def test_minus_one_takes_the_remaining_devices() -> None:
    mesh = small_config(**{"mesh.fsdp": 2, "mesh.tensor": 2}).mesh
    assert axis_sizes(mesh, 8) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert min_devices(mesh) == 4
    assert axis_sizes(small_config(**{"mesh.data": 1, "mesh.fsdp": -1}).mesh, 6)["fsdp"] == 6


@pytest.mark.parametrize(
    ("sizes", "n_devices", "message"),
    [
        ({"fsdp": 3}, 8, "config.mesh has fsdp 3 = 3 devices, but there are 8 devices; the product must divide 8."),
        ({"data": 1, "tensor": 4}, 8, "config.mesh has tensor 4 = 4 devices, but there are 8 devices; "),
        ({"fsdp": 2}, 1, "config.mesh has fsdp 2 = 2 devices, but there is 1 device; "),
        ({"fsdp": -1}, 8, "config.mesh: only one axis may be -1, not both data and fsdp."),
        ({"tensor": 0}, 8, "config.mesh.tensor=0: "),
    ],
)
def test_invalid_mesh_is_rejected(sizes: dict[str, int], n_devices: int, message: str) -> None:
    mesh = small_config(**{f"mesh.{axis}": size for axis, size in sizes.items()}).mesh
    with pytest.raises(UserError, match=re.escape(message)):
        axis_sizes(mesh, n_devices)


def test_unequal_batch_shards_are_rejected() -> None:
    config = small_config(**{"training.batch_size": 12})
    with pytest.raises(
        UserError, match="cannot be divided equally among 8 devices; the nearest batch size that can is 16"
    ):
        check_batch_shards(config, 32, 8)
    config = small_config(**{"training.batch_size": 8, "mesh.context": 3})
    with pytest.raises(UserError, match=r"config.mesh.context=3 does not divide the sequence length 32"):
        check_batch_shards(config, 32, 3)
    check_batch_shards(small_config(**{"mesh.tensor": 4}), 32, 4)


@pytest.mark.slow
def test_train_rejects_an_invalid_mesh_before_creating_the_folder(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "launch.py"), "train", f"--config={root / 'configs/tiny.py'}"]
    command += ["--config.mesh.fsdp=3", f"--run={tmp_path / 'run'}"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "the product must divide 8." in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
