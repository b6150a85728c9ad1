"""Diff: the input in which two runs differ is named first, then the first tensor that differs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import check_result, copy_code, new_console, output_of, run_config, train_elsewhere

from rustgpt_jax.config.schema import replace_paths
from rustgpt_jax.errors import UserError
from rustgpt_jax.reproduce import run_diff, step_trace
from rustgpt_jax.reproduce.run_diff import compare_metadata, diff
from rustgpt_jax.reproduce.step_trace import TensorDifference
from rustgpt_jax.workdir.code_snapshot import code_files, code_hash
from rustgpt_jax.workdir.event_log import EventLog
from rustgpt_jax.workdir.run_dir import RunDir, create_run_dir

VALUES = {"python": {"version": "3.11"}, "packages": {"jax": "0.10.2", "flax": "0.12"}, "machine": {"cores": 2}}
LAUNCH = {"step": 0, "argv": [], "cwd": "/", "git": None, "mode": "solo", "width": 1, "devices": 1}
FILES = {"a.txt": "1", "b.txt": "2"}
DATA = {"stage": "train", "source": "ab" * 32, "tokenizer": "cd" * 32, "splits": {}, "files": FILES, "n_dialogues": 0}
CODE = {"rustgpt_jax/model/kv_cache.py": "def visible(q, s):\n    return q >= s\n", "launch.py": "print()\n"}


def run_diff_verb(first: Path, second: Path, is_trusted: bool = False) -> tuple[bool, list[str]]:
    """Return whether two runs are the same, and the lines of the output."""
    console = new_console(300)
    found = diff(first, second, console, is_trusted)
    check_result("diff", {"first": first, "second": second, **found.describe()})
    return found.is_same, output_of(console).splitlines()


# Comparison of the inputs of runs, with folders written by hand.


def write_run(path: Path, **changes: Any) -> RunDir:
    """Write a run folder with all records, with `changes` of config, code, environment, data, launch or programs."""
    run = create_run_dir(path, replace_paths(run_config(), changes.get("config", {})), {})
    code = path / "files"
    for name, content in (CODE | changes.get("code", {})).items():
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text(content)
    name = code_hash(code_files(list(code.iterdir())))
    run.code.mkdir()
    shutil.make_archive(str(run.code / name), "zip", code)
    environment = json.loads(json.dumps(VALUES))
    for group, values in changes.get("environment", {}).items():
        environment[group] |= values
    journal = EventLog(run.events_file)
    journal.append("launch", **(LAUNCH | changes.get("launch", {})), code=name, environment=environment)
    for stage, stablehlo in changes.get("programs", {"train": "ef" * 32}).items():
        journal.append("program", stage=stage, step=0, stablehlo=stablehlo, cache_key=None)
    run.data_file.write_text(json.dumps([DATA | changes.get("data", {})]))
    return run


@pytest.fixture
def first(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "first")


def list_differences(first: RunDir, second: RunDir) -> dict[str, list[str]]:
    """Return the names of the differences by section."""
    return {
        each.kind: [found.name for found in each.differences]
        for each in compare_metadata(first, second)
        if each.differences
    }


@pytest.mark.parametrize(
    ("changes", "kind", "name"),
    [
        ({"config": {"optimizer.weight_decay": 0.3}}, "config", "config.optimizer.weight_decay"),
        ({"config": {"seed": 7}}, "config", "config.seed"),
        ({"code": {"launch.py": "print(1)\n"}}, "code", "launch.py"),
        ({"code": {"my_lab.py": ""}}, "code", "my_lab.py"),
        ({"environment": {"packages": {"flax": "0.13"}}}, "environment", "packages.flax"),
        ({"environment": {"machine": {"cores": 64}}}, "environment", "machine.cores"),
        ({"environment": {"packages": {"new": "1"}}}, "environment", "packages.new"),
        ({"data": {"source": "00" * 32, "files": {"a.txt": "1", "b.txt": "3"}}}, "data", "stage train: b.txt"),
        ({"data": {"source": "00" * 32, "files": {"/x/a.txt": "1", "/x/b.txt": "3"}}}, "data", "stage train: b.txt"),
        ({"data": {"source": "00" * 32, "files": {}}}, "data", "stage train: "),
        ({"data": {"tokenizer": "00" * 32}}, "data", "stage train: the tokenizer"),
        ({"programs": {"train": "00" * 32}}, "program", "stage train"),
    ],
)
def test_single_difference_is_named(
    tmp_path: Path, first: RunDir, changes: dict[str, Any], kind: str, name: str
) -> None:
    found = list_differences(first, write_run(tmp_path / "second", **changes))
    assert found.keys() == {kind}
    assert all(each.startswith(name) for each in found[kind])
    _, lines = run_diff_verb(first.path, tmp_path / "second")
    assert lines[lines.index(f"{kind}:") + 1].startswith(f"  {name}")
    assert [line for line in lines if line.endswith(": the same")] == [
        f"{each}: the same" for each in ("config", "code", "environment", "data", "program") if each != kind
    ]


def test_equal_runs_and_programs_of_different_modes(tmp_path: Path, first: RunDir) -> None:
    # The same text in other files elsewhere.
    same = write_run(tmp_path / "same", data={"files": {"/other/a.txt": "9", "/other/c.txt": "8"}})
    is_same, lines = run_diff_verb(first.path, same.path)
    assert is_same and list_differences(first, same) == {} and "losses: the same for 0 steps" in lines
    exact = write_run(tmp_path / "exact", launch={"mode": "exact", "width": 4}, programs={"train": "00" * 32})
    assert list_differences(first, exact) == {"environment": ["launch.mode"]}
    _, lines = run_diff_verb(first.path, exact.path)
    assert "program: not compared. The first run was trained in the mode solo of 1, the second in exact of 4." in lines


def test_changed_code_is_shown_as_a_patch(tmp_path: Path, first: RunDir) -> None:
    other = {
        "launch.py": '"""Words."""\n\n# More words.\nprint()\n',
        "rustgpt_jax/model/kv_cache.py": "def visible(q, s):\n    return q > s\n",
    }
    second = write_run(tmp_path / "second", code=other)
    _, lines = run_diff_verb(first.path, second.path)
    place = lines.index("code:")
    assert lines[place + 1] == "  rustgpt_jax/model/kv_cache.py"
    assert "    -    return q >= s" in lines and "    +    return q > s" in lines
    assert "  launch.py (only comments and docstrings)" in lines


def test_overrides_of_stages_are_named(tmp_path: Path) -> None:
    stages = [[{"name": "a"}, {"name": "b", "optimizer": {"learning_rate": rate}}] for rate in (0.1, 0.2)]
    runs = [write_run(tmp_path / str(number)) for number in range(3)]
    for run, run_stages in zip(runs, [*stages, stages[0][:1]], strict=True):
        record = json.loads(run.config_file.read_text())
        record["config"]["stages"] = run_stages
        run.config_file.write_text(json.dumps(record))
    assert list_differences(runs[0], runs[1]) == {"config": ["config.stages.b.optimizer.learning_rate"]}
    assert list_differences(runs[0], runs[2])["config"][0] == "config.stages"


def test_missing_records_are_reported(tmp_path: Path, first: RunDir) -> None:
    second = write_run(tmp_path / "second", config={"seed": 3})
    second.events_file.unlink()
    third = write_run(tmp_path / "third")
    third.events_file.unlink()
    # No difference is known, but much is unknown.
    assert list_differences(first, third) == {} and not run_diff_verb(first.path, third.path)[0]
    _, lines = run_diff_verb(first.path, second.path)
    assert "  config.seed: 0 -> 3" in lines
    for kind in ("code", "environment"):
        reason = f"{second.path} has no record of its launches: events.jsonl is missing or lists none."
        assert f"{kind}: not compared. {reason}" in lines
    assert f"program: not compared. {second.path} has no record of its programs." in lines
    with pytest.raises(UserError, match="There is no run"):
        diff(tmp_path / "gone", first.path, new_console())


# The first tensor that differs, in traces written by hand.


def make_step(number: int) -> dict[str, dict[str, str]]:
    return {
        "batch": {"tokens_BT": "a"},
        "before": {"params/x": f"x{number}", "opt_state/m": "b"},
        "activations": {"blocks/0/mixer/query": "c", "logits": "d"},
        "loss": {"train/loss": "1.0"},
        "gradients": {"logits": "e", "params/x": "f"},
        "after": {"params/x": f"x{number + 1}", "opt_state/m": "g"},
    }


def change_from(step: dict[str, dict[str, str]], part: str, name: str) -> None:
    """Change a tensor of a step, and all that is computed after it."""
    for each in step_trace.PARTS[step_trace.PARTS.index(part) :]:
        names = list(step[each])
        for changed in names[names.index(name) if each == part else 0 :]:
            step[each][changed] += "!"


PLACES = [
    ("batch", "tokens_BT"),
    ("before", "opt_state/m"),
    ("activations", "logits"),
    ("loss", "train/loss"),
    ("gradients", "params/x"),
    ("after", "params/x"),
]


@pytest.mark.parametrize(("part", "name"), PLACES)
def test_first_tensor_is_the_first_in_order_of_computation(
    part: str, name: str, first: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def trace(run: RunDir, begin: int, last: int, with_intermediates: bool, is_trusted: bool) -> step_trace.Trace:
        calls.append((begin, last, with_intermediates))
        steps = {number: make_step(number) for number in range(begin, last + 1)}
        for number, step in steps.items():
            if run is not first and number == 4:
                change_from(step, part, name)
            if run is not first and number > 4:
                change_from(step, "before", "params/x")
            if not with_intermediates:
                step["activations"].clear(), step["gradients"].clear()
        return steps

    monkeypatch.setattr(step_trace, "trace_steps", trace)
    second = RunDir(first.path)
    for agreed, parted in ((3, 4), (4, 5), (0, 6), (0, 9), (5, 6), (8, 9)):
        assert step_trace.find_first_tensor(first, second, agreed, parted) == TensorDifference(4, part, name)
    # Intermediates of many steps are not traced.
    assert all(last - begin < step_trace.FEW_STEPS for begin, last, with_intermediates in calls if with_intermediates)


def test_likely_cause_is_one_that_the_tensor_depends_on(tmp_path: Path, first: RunDir) -> None:
    both = {"config": {"optimizer.weight_decay": 0.3, "model.dropout": 0.5, "data.max_documents": 7}}
    second = write_run(tmp_path / "second", **both, environment={"packages": {"flax": "0.13", "optax": "9"}})
    found = compare_metadata(first, second)

    def likely(part: str) -> list[str]:
        return [each.name for each in run_diff._likely_causes(TensorDifference(1, part, "x"), found)]

    assert likely("batch") == ["config.data.max_documents"]
    assert likely("activations") == ["config.model.dropout", "packages.flax"]
    assert likely("after") == ["config.optimizer.weight_decay", "packages.optax"]


def test_without_recomputation_every_difference_is_a_likely_cause(
    tmp_path: Path, first: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("The text is gone.")

    monkeypatch.setattr(run_diff, "find_first_tensor", refuse)
    second = write_run(tmp_path / "second", config={"seed": 3})
    for run, loss in ((first, 1.0), (second, 2.0)):
        run.metrics_file.write_text(json.dumps({"step": 1, "train/loss": loss}) + "\n")
    is_same, lines = run_diff_verb(first.path, second.path)
    assert not is_same
    assert lines[-3:] == [
        "losses: Step 1 is the first that differs: train/loss is 1.0 in the first run and 2.0 in the second.",
        "first tensor: not found. The text is gone.",
        "likely cause: config.seed: 0 -> 3",
    ]


# Whole runs that differ in one input.

CORPUS = {"data.corpus": "files", "data.paths": ["texts/*.txt"], "data.split": "tail"}
KV_CACHE = "rustgpt_jax/model/kv_cache.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of two files, a copy of the code, and a run."""
    folder = tmp_path_factory.mktemp("diff")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("To be, or not to be.\n" * 40)
    (folder / "texts" / "b.txt").write_text("That is the question.\n" * 40)
    # A copy, because the code here may be edited while this runs.
    copy_code(folder / "code")
    train_elsewhere(folder / "run", folder / "code", **CORPUS)
    return folder


def change_code(folder: Path) -> None:
    file = folder / "code" / KV_CACHE
    before = file.read_text()
    # A token sees the one after it.
    file.write_text(before.replace("attention_mask(order_T, order_T", "attention_mask(order_T + 1, order_T"))
    assert file.read_text() != before


def change_package(folder: Path) -> None:
    metadata = folder / "site" / "flax-99.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: flax\nVersion: 99\n")


def change_text(folder: Path) -> None:
    (folder / "texts" / "b.txt").write_text("That is no question.\n" * 40)


def change_nothing(folder: Path) -> None:
    del folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "knobs", "kind", "name", "cause"),
    [
        (change_code, {}, "code", KV_CACHE, "not the same activations: "),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (
                    *(change_nothing, {"optimizer.weight_decay": 0.2}, "config"),
                    *("config.optimizer.weight_decay: 0.1 -> 0.2", "not the same update: "),
                ),
                (change_nothing, {"seed": 1}, "config", "config.seed: 0 -> 1", "not the same batch: "),
                (change_package, {}, "environment", "packages.flax: ", ""),
                (change_text, {}, "data", "stage train: texts/b.txt: ", "not the same batch: "),
            )
        ),
    ],
)
def test_changed_input_and_first_tensor_are_named(
    trained: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    knobs: dict[str, Any],
    kind: str,
    name: str,
    cause: str,
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    train_elsewhere(tmp_path / "other", tmp_path / "code", {"PYTHONPATH": str(tmp_path / "site")}, **CORPUS, **knobs)
    is_same, lines = run_diff_verb(tmp_path / "run", tmp_path / "other", is_trusted=True)
    text = "\n".join(lines)
    first = next(index for index, line in enumerate(lines) if line.endswith(":"))
    assert not is_same and lines[first] == f"{kind}:" and lines[first + 1].startswith(f"  {name}"), text
    if cause:
        assert cause in lines[-1] and lines[-1].split(cause)[1].startswith(name), text
    else:
        assert "losses: the same for 6 steps" in lines, text
    assert os.listdir(tmp_path / "run") == os.listdir(trained / "run")
