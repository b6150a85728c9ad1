"""Run folders: creation, comparison of configs, loading, and locking."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from rustgpt_jax.config.schema import Config, config_hash, replace_paths
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.errors import UserError
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir, load_config, lock_run_dir


@pytest.fixture
def config() -> Config:
    return resolve(base.get_config())


def with_stages(*stages: dict) -> Config:
    tree = base.get_config()
    tree.stages = stages
    return resolve(tree)


def test_config_round_trips(tmp_path: Path) -> None:
    config = with_stages({"name": "pretrain"}, {"name": "instruct", "optimizer": {"learning_rate": 3e-4}})
    run = create_run_dir(tmp_path / "runs" / "a", config, {"seed": "configs/base.py"})
    assert load_config(run.path) == config
    stored = json.loads(run.config_file.read_text())
    assert stored["hash"] == config_hash(config)
    assert stored["origins"] == {"seed": "configs/base.py"}


def test_same_config_is_not_rewritten(tmp_path: Path, config: Config) -> None:
    before = create_run_dir(tmp_path, config, {"seed": "first"}).config_file.read_bytes()
    assert create_run_dir(tmp_path, config, {"seed": "second"}).config_file.read_bytes() == before


def test_another_config_is_rejected_with_its_differences(tmp_path: Path, config: Config) -> None:
    create_run_dir(tmp_path, config, {})
    other = replace_paths(config, {"training.steps": 400, "optimizer.name": "lion"})
    with pytest.raises(UserError) as refusal:
        create_run_dir(tmp_path, other, {})
    text = str(refusal.value)
    assert "training.steps is 200 in the run and 400 in this config" in text
    assert "optimizer.name is 'adamw' in the run and 'lion' in this config" in text
    assert "seed" not in text
    assert text.endswith("Choose another --run folder.") and "delete" not in text
    assert load_config(tmp_path) == config


def test_many_differences_are_truncated(tmp_path: Path, config: Config) -> None:
    create_run_dir(tmp_path, config, {})
    model = replace_paths(
        config.model,
        {
            "n_layers": 8,
            "d_model": 64,
            "attention.n_heads": 2,
            "d_ff": 8,
            "bias": True,
            "norm": "layernorm",
            "dropout": 0.5,
            "attention.qk_norm": "head",
        },
    )
    with pytest.raises(UserError, match="; and 2 more. Choose"):
        create_run_dir(
            tmp_path,
            dataclasses.replace(config, model=model, seed=1, data=dataclasses.replace(config.data, seq_len=9)),
            {},
        )


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            ({"name": "one", "training": {"steps": 7}},),
            "stages.one.training.steps is 5 in the run and 7 in this config",
        ),
        (({"name": "one"},), "stages.one.training.steps is 5 in the run and 'not overridden' in this config"),
        (({"name": "two"},), r"stages is \('one',\) in the run and \('two',\) in this config"),
    ],
)
def test_stages_are_compared_by_field(tmp_path: Path, stages: tuple[dict, ...], said: str) -> None:
    create_run_dir(
        tmp_path, with_stages({"name": "one", "training": {"steps": 5}, "schedule": {"warmup_steps": 1}}), {}
    )
    other = tuple({**stage, "schedule": {"warmup_steps": 1}} for stage in stages)
    with pytest.raises(UserError, match=said):
        create_run_dir(tmp_path, with_stages(*other), {})


def test_folder_with_other_files_is_rejected(tmp_path: Path, config: Config) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files but no run"):
        create_run_dir(tmp_path, config, {})
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_hidden_files_of_a_crash_do_not_count(tmp_path: Path, config: Config) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.123").touch()
    assert load_config(create_run_dir(tmp_path, config, {}).path) == config


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_file_in_place_of_the_folder_is_rejected(tmp_path: Path, config: Config, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created: there is a file in its place"):
        create_run_dir(tmp_path / place, config, {})


def test_read_only_disk_is_reported(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        create_run_dir(tmp_path / "run", config, {})


def test_misspelled_run_gets_a_suggestion(tmp_path: Path, config: Config) -> None:
    create_run_dir(tmp_path / "shakespeare", config, {})
    (tmp_path / "shakespear_notes").mkdir()
    with pytest.raises(UserError, match="There is no run .*shakespare. Did you mean 'shakespeare'"):
        load_config(tmp_path / "shakespare")


def test_load_config_rejects_other_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.json"):
        load_config(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        load_config(tmp_path / "file")


@pytest.mark.parametrize("content", ['{"config": {"seed"', "[]", "{}", '{"config": 3}', "\xff"])
def test_damaged_config_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="config.json is damaged"):
        load_config(tmp_path)


def test_stored_config_with_unknown_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config": {"sead": 1}}')
    with pytest.raises(UserError, match=r"config.json: config.sead: unknown field.*config.seed"):
        load_config(tmp_path)


def test_lock_error_names_the_holder(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=f"process {os.getpid()} on .* is training in it")
    with lock_run_dir(tmp_path), refused, lock_run_dir(tmp_path):
        pass
    with lock_run_dir(tmp_path):
        pass


def test_lock_is_released_when_the_process_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from rustgpt_jax.workdir.run_dir import lock_run_dir\n"
        "with lock_run_dir(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    ) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {trainer.pid} "), lock_run_dir(tmp_path):
            pass
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        with lock_run_dir(tmp_path):
            pass


def test_unreadable_checkpoints_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise `diff` would silently compare no checkpoints."""
    run = RunDir(tmp_path)
    assert run.saved_steps == []
    for name in ("5", "30", "best", ".probe", "05"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.saved_steps == [5, 30]

    def refuse(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UserError, match=r"checkpoints cannot be read: Permission denied"):
        run.saved_steps  # noqa: B018 (reading the property raises)
