"""Offloading of optimizer state to host memory."""

from pathlib import Path
from typing import Any

import jax
import pytest
from test_loop import assert_same_bits, metrics, stored_state, tiny, train

from rustgpt_jax.config.schema import partition
from rustgpt_jax.errors import UserError
from rustgpt_jax.sharding.sharding_plan import check_host_offload
from rustgpt_jax.training.optimizers import OPTIMIZERS
from rustgpt_jax.training.train_step import compiled_init_state

pytestmark = pytest.mark.usefixtures("quick_codegen")


def kinds(tree: Any) -> set[str | None]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_offloaded_optimizer_state_is_created_in_host_memory(name: str) -> None:
    static, hparams = partition(tiny(**{"optimizer.offload_state": True, "optimizer.name": name}))
    state = compiled_init_state(static, hparams)
    assert kinds(state.opt_state) == {"pinned_host"}
    assert kinds(state.params) == {"device"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", pytest.param("schedule_free", marks=pytest.mark.long)])
def test_offloading_is_bit_exact(name: str, tmp_path: Path) -> None:
    here = tiny(**{"optimizer.name": name, "training.steps": 6})
    there = tiny(**{"optimizer.name": name, "training.steps": 6, "optimizer.offload_state": True})
    assert train(here, tmp_path / "here")[0] and train(there, tmp_path / "there")[0]
    assert_same_bits(stored_state(here, tmp_path / "here"), stored_state(there, tmp_path / "there"))
    assert metrics(tmp_path / "here") == metrics(tmp_path / "there")


def test_devices_without_access_to_host_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        device_kind = "a small one"

        def addressable_memories(self) -> list[Any]:
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(UserError, match="a small one has no access to host memory"):
        check_host_offload(tiny(**{"optimizer.offload_state": True}))
    check_host_offload(tiny())
