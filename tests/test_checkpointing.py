"""Checkpoints: restore is bit-exact, damage is detected, and the recent and the best ones are preserved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rustgpt_jax.config.schema import Config, partition
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import parameter_shapes
from rustgpt_jax.training import checkpointing
from rustgpt_jax.training.checkpointing import Checkpoints, CorruptCheckpoint, tree_spec
from rustgpt_jax.training.optimizers import OPTIMIZERS, make_optimizer
from rustgpt_jax.training.train_step import TrainState, compiled_init_state, init_loss_stats

pytestmark = pytest.mark.usefixtures("quick_codegen")

CONFIG = small_config()


def state_of(name: str = "adamw", seed: int = 0) -> TrainState:
    """Return a state filled with random bits, including NaNs, infinities and denormals."""
    config = small_config(**{"optimizer.name": name, "model.d_model": 8})
    shapes = parameter_shapes(config.model)
    opt_shapes = jax.eval_shape(make_optimizer(config.optimizer).init, shapes)
    state = TrainState(shapes, opt_shapes, jax.ShapeDtypeStruct((), np.dtype("int32")), jax.eval_shape(init_loss_stats))
    generator = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        raw = generator.bytes(leaf.dtype.itemsize * int(np.prod(leaf.shape, dtype=int)))
        return jnp.asarray(np.frombuffer(raw, leaf.dtype).reshape(leaf.shape))

    return jax.tree.map(fill, state)


def small_state(**params: Any) -> TrainState:
    """Return a state with a few arrays."""
    arrays = {name: jnp.asarray(value) for name, value in params.items()}
    return TrainState(arrays, (), jnp.asarray(3, jnp.int32), init_loss_stats())


def shapes_of(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder: Path, state: TrainState, *steps: int, is_best: bool = False, config: Config = CONFIG) -> None:
    with Checkpoints(folder, config, is_writer=True) as checkpoints:
        for step in steps:
            checkpoints.save(state, step, is_best)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restore_is_bit_exact(tmp_path: Path, name: str) -> None:
    state = state_of(name)
    save(tmp_path, state, 5)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.step() == 5
        assert_same_bits(checkpoints.restore(shapes_of(state)), state)


def test_layout_matches_a_real_state() -> None:
    config = small_config(**{"optimizer.name": "muon", "model.d_model": 8})
    static, hparams = partition(config)
    like = jax.eval_shape(lambda: compiled_init_state(static, hparams))
    assert tree_spec(like) == tree_spec(state_of("muon"))
    assert tree_spec(like)["params/embedding/table"] == "float32[61, 8]"
    assert tree_spec(like)["step"] == "int32[]"


def test_save_is_not_affected_by_later_donation(tmp_path: Path) -> None:
    names = [str(index) for index in range(20)]
    state = small_state(**{name: np.arange(2**18, dtype=np.float32) for name in names})
    # A step reuses the buffers of the previous state.
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    step(jax.tree.map(jnp.copy, state))
    with Checkpoints(tmp_path, CONFIG, is_writer=True) as checkpoints:
        checkpoints.save(state, 1)
        step(state)
        checkpoints.wait()
        restored = checkpoints.restore(shapes_of(state))
    for name in names:
        np.testing.assert_array_equal(restored.params[name], np.arange(2**18))


def test_recent_and_best_checkpoints_are_preserved(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CONFIG, is_writer=True) as checkpoints:
        assert checkpoints.step() is None
        for step in range(1, 8):
            checkpoints.save(small_state(a=float(step)), step, is_best=step in (1, 3))
        checkpoints.wait()
        assert kept(tmp_path) == [3, 6, 7]
        assert (checkpoints.step(), checkpoints.step("best")) == (7, 3)
        like = shapes_of(small_state(a=0.0))
        assert (checkpoints.restore(like).params["a"], checkpoints.restore(like, "best").params["a"]) == (7.0, 3.0)


def test_previous_best_is_valid_until_the_new_one_is_written(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=1.0), 1, is_best=True)
    save(tmp_path, small_state(a=2.0), 2, 3, 4)
    save(tmp_path, small_state(a=5.0), 5, is_best=True)
    assert kept(tmp_path) == [1, 4, 5]
    # As after a kill during the save.
    (tmp_path / "5").rename(tmp_path / "5.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert (checkpoints.step(), checkpoints.step("best")) == (4, 1)


def test_kill_while_saving_the_best_loses_no_other_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=1.0), 4, is_best=True)
    save(tmp_path, small_state(a=2.0), 6, is_best=True)
    (tmp_path / "6").rename(tmp_path / "6.orbax-checkpoint-tmp")
    save(tmp_path, small_state(a=3.0), 7, 8, 9)
    assert kept(tmp_path) == [4, 8, 9]
    save(tmp_path, small_state(a=2.0), 10, is_best=True)
    assert json.loads((tmp_path / "best").read_bytes()) == [10, 4]


def test_existing_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    # A killed process may have left this folder.
    (tmp_path / ".probe").mkdir()
    save(tmp_path, small_state(a=1.0), 7)
    save(tmp_path, small_state(a=2.0), 7)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(shapes_of(small_state(a=0.0))).params["a"] == 1.0


def test_reader_does_not_delete_unfinished_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=1.0), 4)
    begun = tmp_path / "8.orbax-checkpoint-tmp" / "state"
    begun.mkdir(parents=True)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.step() == 4
        assert checkpoints.restore(shapes_of(small_state(a=0.0))).params["a"] == 1.0
    assert begun.is_dir()
    save(tmp_path, small_state(a=2.0), 8)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(shapes_of(small_state(a=0.0))).params["a"] == 2.0


# Refusals.


@pytest.mark.parametrize(("which", "what"), [("last", "checkpoint"), ("best", "best checkpoint")])
def test_restore_without_checkpoints_is_an_error(tmp_path: Path, which: str, what: str) -> None:
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(UserError, match=f"has no {what} yet"):
        checkpoints.restore(shapes_of(small_state(a=[0.0])), which)


def test_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=[1.0]), 4)
    with (
        Checkpoints(tmp_path, small_config(seed=1)) as checkpoints,
        pytest.raises(UserError, match=r"/4 .* another config: seed is 0 in the run and 1 in this config\."),
    ):
        checkpoints.restore(shapes_of(small_state(a=[0.0])))


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"a": [0.0, 0.0], "c": [0.0]}, r"/4: params/c is missing in the checkpoint, and float32\[1\] in the config\."),
        ({}, r"/4: params/a is float32\[2\] in the checkpoint, and missing in the config\."),
        ({"a": [0.0]}, r"/4: params/a is float32\[2\] in the checkpoint, and float32\[1\] in the config\."),
        ({"a": [[0.0, 0.0]]}, r"params/a is float32\[2\] in the checkpoint, and float32\[1, 2\] in the config\."),
        (
            {"a": jnp.zeros(2, jnp.bfloat16)},
            r"params/a is float32\[2\] in the checkpoint, and bfloat16\[2\] in the config\.",
        ),
    ],
    ids=["missing", "extra", "shape", "rank", "dtype"],
)
def test_other_arrays_are_refused_by_name(tmp_path: Path, wanted: dict[str, Any], sentence: str) -> None:
    save(tmp_path, small_state(a=[1.0, 2.0]), 4)
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(UserError, match=sentence):
        checkpoints.restore(shapes_of(small_state(**wanted)))


def test_optimizer_state_is_compared_too(tmp_path: Path) -> None:
    save(tmp_path, state_of("adamw"), 4)
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(UserError, match=r"/4: opt_state/\S+ is "):
        checkpoints.restore(shapes_of(state_of("lion")))


# Other devices.

ON_THE_SECOND_DEVICE = """
import sys
import os
import subprocess
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import jax
from test_checkpointing import save, small_state
with jax.default_device(jax.devices()[1]):
    save(Path(sys.argv[1]), small_state(a=[1.0, 2.0]), 4)
"""


@pytest.mark.slow
def test_restore_from_another_device(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    code = ON_THE_SECOND_DEVICE.format(root=str(tests.parent), tests=str(tests))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, capture_output=True)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        restored = checkpoints.restore(shapes_of(small_state(a=[0.0, 0.0])))
    np.testing.assert_array_equal(restored.params["a"], [1.0, 2.0])


# Damage.


def damaged_copies(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "8").rglob("*") if path.is_file())


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :] if content else b"x"


DAMAGE = {"truncated": truncated, "a byte flipped": flipped, "missing": None}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_detected(tmp_path: Path, damage: str) -> None:
    arrays = {name: np.random.default_rng(3).normal(size=(40, 50)).astype(np.float32) for name in "ab"}
    before, last = (small_state(**{name: array + step for name, array in arrays.items()}) for step in (4, 8))
    save(tmp_path, before, 4)
    save(tmp_path, last, 8)
    n_noticed = 0
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for file in damaged_copies(tmp_path):
            content, change = file.read_bytes(), DAMAGE[damage]
            file.unlink()
            if change:
                file.write_bytes(change(content))
            on_skipped: dict[int, str] = {}
            restored = checkpoints.restore(shapes_of(last), on_skipped=on_skipped.__setitem__)
            # Undetected damage is harmless: some files repeat the content of others.
            assert_same_bits(restored, before if on_skipped else last)
            assert all(reason and "\n" not in reason for reason in on_skipped.values())
            n_noticed += bool(on_skipped)
            file.write_bytes(content)
        assert_same_bits(checkpoints.restore(shapes_of(last)), last)
    assert n_noticed >= 4


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_detected_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    state = small_state(a=np.random.default_rng(5).normal(size=(30, 30)).astype(np.float32))
    if not (tmp_path / "8").exists():
        save(tmp_path, state, 8)
    file = data.draw(st.sampled_from(damaged_copies(tmp_path)))
    content = bytearray(file.read_bytes())
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[place] ^= 1 << bit
    file.write_bytes(content)
    try:
        with Checkpoints(tmp_path, CONFIG) as checkpoints:
            assert_same_bits(checkpoints.restore_step(shapes_of(state), 8), state)
    except CorruptCheckpoint:
        pass
    finally:
        content[place] ^= 1 << bit
        file.write_bytes(content)


def test_replaced_array_is_detected(tmp_path: Path) -> None:
    # All files are valid, but they were not saved together.
    save(tmp_path / "one", small_state(a=[1.0, 2.0]), 4)
    save(tmp_path / "other", small_state(a=[1.0, 2.5]), 4)
    shutil.rmtree(tmp_path / "one/4/state")
    shutil.copytree(tmp_path / "other/4/state", tmp_path / "one/4/state")
    sums, others = (json.loads((tmp_path / name / "4/sha256.json").read_bytes()) for name in ("one", "other"))
    own = {name: digest for name, digest in sums.items() if not name.startswith("state/")}
    (tmp_path / "one/4/sha256.json").write_text(
        json.dumps(own | {name: digest for name, digest in others.items() if name.startswith("state/")})
    )
    with (
        Checkpoints(tmp_path / "one", CONFIG) as checkpoints,
        pytest.raises(CorruptCheckpoint, match="params/a is not what was"),
    ):
        checkpoints.restore_step(shapes_of(small_state(a=[0.0, 0.0])), 4)


def test_restore_without_valid_checkpoints_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=[1.0]), 4, 8)
    for step in (4, 8):
        shutil.rmtree(tmp_path / str(step) / "state")
    with (
        Checkpoints(tmp_path, CONFIG) as checkpoints,
        pytest.raises(UserError, match=r"no valid checkpoint .*8: .*4: "),
    ):
        checkpoints.restore(shapes_of(small_state(a=[0.0])))
    assert kept(tmp_path) == [4, 8]


def test_quarantined_checkpoint_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=[1.0]), 4, 8)
    with Checkpoints(tmp_path, CONFIG, is_writer=True) as checkpoints:
        assert checkpoints.quarantine(8).is_dir()
        assert checkpoints.step() == 4
        checkpoints.save(small_state(a=[3.0]), 8)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(shapes_of(small_state(a=[0.0]))).params["a"] == 3.0


def test_last_scheduled_checkpoint_is_preserved(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CONFIG, is_writer=True) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(small_state(a=[float(step)]), step, is_scheduled=step in (1, 3))
        checkpoints.wait()
        assert (kept(tmp_path), checkpoints.last_scheduled(7), checkpoints.last_scheduled(2)) == ([3, 6, 7], 3, None)
        checkpoints.delete_after(3)
        assert (kept(tmp_path), checkpoints.step()) == ([3], 3)


# Checkpoints under other names, and malformed JSON.

SHAPES = ["null", "[]", "{}", "5", '"x"', "true", "[1, 2]", '{"a": null}', "[" * 100_000, "[" * 900 + "]" * 900]


def test_checkpoint_of_a_stop_can_become_scheduled(tmp_path: Path) -> None:
    state = small_state(a=[1.0])
    with Checkpoints(tmp_path, CONFIG, is_writer=True) as checkpoints:
        checkpoints.save(state, 1, is_scheduled=False)
        assert checkpoints.last_scheduled(1) is None
    with Checkpoints(tmp_path, CONFIG, is_writer=True) as checkpoints:
        checkpoints.save(state, 1, is_best=True)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.last_scheduled(1) == 1
        assert_same_bits(checkpoints.restore(shapes_of(state)), state)


def test_checkpoint_under_another_name_is_skipped_and_replaced(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=[5.0]), 50)
    shutil.copytree(tmp_path / "50", tmp_path / "60")
    like, on_skipped = shapes_of(small_state(a=[0.0])), dict[int, str]()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(like, on_skipped=on_skipped.__setitem__).params["a"] == 5.0
    assert on_skipped == {60: "it is the checkpoint of step 50 under another name"}
    with Checkpoints(tmp_path, CONFIG, is_writer=True) as checkpoints:
        checkpoints.save(small_state(a=[6.0]), 60)
        # A folder that appears during training.
        shutil.copytree(tmp_path / "50", tmp_path / "70")
        checkpoints.save(small_state(a=[7.0]), 70)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step, value in ((60, 6.0), (70, 7.0)):
            assert checkpoints.restore_step(like, step).params["a"] == value
    assert {"60.damaged", "70.damaged"} <= {path.name for path in tmp_path.iterdir()}


def json_files(checkpoint: Path) -> list[str]:
    """Return the files of a checkpoint that contain JSON."""

    def is_json(file: Path) -> bool:
        try:
            json.loads(file.read_bytes())
        except ValueError:
            return False
        return True

    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and is_json(file))
    return [str(file.relative_to(checkpoint)) for file in files]


def update_checksums(checkpoint: Path) -> None:
    """Replace the checksums of a checkpoint by those of its files."""
    file = checkpoint / "sha256.json"
    file.write_text(
        json.dumps({name: checkpointing._sha256(checkpoint / name) for name in json.loads(file.read_bytes())})
    )


@pytest.mark.parametrize("has_new_checksums", [False, True])
def test_malformed_json_is_detected(tmp_path: Path, has_new_checksums: bool) -> None:
    """In each file, and in each field of the metadata even if the checksums match."""
    state = small_state(a=[1.0])
    save(tmp_path, state, 4, 8)
    last, n_noticed = tmp_path / "8", 0
    shutil.copytree(last, tmp_path / "sound")
    about = json.loads((last / "about/metadata").read_bytes())
    parts = [json.dumps(about | {key: json.loads(shape)}) for key in about for shape in SHAPES[:8]]
    contents = [("about/metadata", content) for content in [*SHAPES, *parts]]
    if not has_new_checksums:
        contents = [(name, shape) for name in json_files(last) for shape in SHAPES]
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for name, content in contents:
            (last / name).write_text(content)
            if has_new_checksums:
                update_checksums(last)
            on_skipped = dict[int, str]()
            try:
                restored = checkpoints.restore(shapes_of(state), on_skipped=on_skipped.__setitem__)
            except UserError as error:
                # Valid types: another config hash or layout.
                assert has_new_checksums and str(error).endswith(".")
            else:
                assert_same_bits(restored, state)
            n_noticed += set(on_skipped) == {8}
            assert not set(on_skipped) - {8}
            shutil.rmtree(last)
            shutil.copytree(tmp_path / "sound", last)
    assert n_noticed > len(contents) / 2


@pytest.mark.parametrize(
    "content", [*(shape for shape in SHAPES if shape != "[1, 2]"), "", "[true]", "[-1]", '["4"]', "not JSON"]
)
def test_damaged_best_file_is_reported_and_loses_no_checkpoint(tmp_path: Path, content: str) -> None:
    save(tmp_path, small_state(a=[1.0]), 2, is_best=True)
    save(tmp_path, small_state(a=[2.0]), 4)
    (tmp_path / "best").write_text(content)
    like = shapes_of(small_state(a=[0.0]))
    sentence = "best is damaged: .* there are checkpoints of steps 2, 4"
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(UserError, match=sentence):
        checkpoints.restore(like, "best")
    save(tmp_path, small_state(a=[6.0]), 6, 8)
    assert kept(tmp_path) == [2, 4, 6, 8]
    save(tmp_path, small_state(a=[9.0]), 10, is_best=True)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(like, "best").params["a"] == 9.0


def test_missing_best_checkpoint_is_reported(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=[1.0]), 2, is_best=True)
    save(tmp_path, small_state(a=[2.0]), 4)
    shutil.rmtree(tmp_path / "2")
    with (
        Checkpoints(tmp_path, CONFIG) as checkpoints,
        pytest.raises(UserError, match="step 2, named by best, is missing; there are checkpoints of steps 4"),
    ):
        checkpoints.restore(shapes_of(small_state(a=[0.0])), "best")


def test_folders_not_named_by_step_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, small_state(a=[1.0]), 4)
    for name in ("²", "٣", "08", "9" * 200, "8.damaged", "-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "12").write_text("a file")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.steps_on_disk() == [4]
        assert checkpoints.restore(shapes_of(small_state(a=[0.0]))).params["a"] == 1.0
