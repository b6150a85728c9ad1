"""Code snapshots: their content, hash, and git state."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as some

from rustgpt_jax.errors import UserError
from rustgpt_jax.sweeps import sweep_dir as sweep_folders
from rustgpt_jax.workdir import code_snapshot
from rustgpt_jax.workdir.code_snapshot import (
    code_files,
    code_hash,
    hash_running_code,
    read_code,
    read_verified_code,
    record_code,
    save_code_snapshot,
    user_modules,
    write_code,
)
from rustgpt_jax.workdir.run_dir import RunDir

ROOT = Path(__file__).parent.parent
FILES = {
    "rustgpt_jax/__init__.py": b"",
    "rustgpt_jax/model/block.py": b"block = 1\n",
    "configs/base.py": "# Größe\n".encode(),
    "launch.py": b"print()\n",
    "pyproject.toml": b"[project]\n",
}
IGNORED = {"README.md": b"read", "rustgpt_jax/__pycache__/block.pyc": b"compiled", "runs/a/config.json": b"{}"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def forget_code() -> None:
    for memory in (code_snapshot._build_archive, code_snapshot._read_source):
        memory.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Clear the caches of a process before and after each test."""
    yield
    forget_code()
    code_snapshot._git_state.cache_clear()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is treated as the running code, with a separate cache."""
    folder = write(tmp_path / "code", FILES | IGNORED)
    monkeypatch.setattr(code_snapshot, "_root", lambda: folder)
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def run_folder(path: Path) -> RunDir:
    path.mkdir(parents=True)
    return RunDir(path)


# Archives.


def test_snapshot_matches_the_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    write_code(read_verified_code(run.code / f"{about['code']}.zip"), tmp_path / "copy")
    there = {name: file for name, file in contents(ROOT).items() if name.split("/")[0] in code_snapshot.CODE}
    assert contents(tmp_path / "copy") == {name: file for name, file in there.items() if "__pycache__" not in name}
    assert about["left_out"] == []
    # The copy can be run.
    shown = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "copy" / "launch.py"), "explain", "--config=configs/tiny.py"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "copy")},
        cwd=tmp_path / "copy",
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "config.model.d_model" in shown.stdout, shown.stderr


def test_archive_contains_only_the_code(code: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert read_code(run.code / f"{save_code_snapshot(run)['code']}.zip") == FILES


def test_snapshot_of_an_installed_package_is_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {
        "rustgpt_jax/__init__.py": b"",
        "rustgpt_jax/configs/base.py": b"1\n",
        "rustgpt_jax/data/facts.json": b"{}",
    }
    # Other packages in the same folder, of which one has the name of a folder of a checkout.
    others = {"configs/base.py": b"2\n", "neighbor.py": b"3\n", "neighbor-1.dist-info/METADATA": b""}
    site = write(tmp_path / "site", package | others)
    own = write(tmp_path / "own", {"experiments/__init__.py": b"4\n"})
    for name, file in {"neighbor": site / "neighbor.py", "own_lab": own / "experiments" / "__init__.py"}.items():
        module = ModuleType(name)
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(code_snapshot, "_root", lambda: site)
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(own)
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    assert about["git"] is None
    assert read_code(run.code / f"{about['code']}.zip") == package | {"experiments/__init__.py": b"4\n"}


@given(
    some.dictionaries(some.sampled_from(sorted(FILES)), some.binary(max_size=20)),
    some.dictionaries(some.sampled_from(sorted(FILES)), some.binary(max_size=20)),
)
@hypothesis.settings(max_examples=15)
def test_hash_depends_on_names_and_contents(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        left, right = (write(Path(folder) / name, files) for name, files in (("a", first), ("b", second)))
        for side in (left, right):
            side.mkdir(exist_ok=True)
        hashes = [code_hash(code_files([side / name for name in code_snapshot.CODE])) for side in (left, right)]
        assert (hashes[0] == hashes[1]) == (first == second)


def test_runs_share_one_copy_by_hard_links(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_folder(tmp_path / name) for name in ("a", "b")]
    names = {f"{save_code_snapshot(run)['code']}.zip" for run in runs}
    (name,) = names
    files = [run.code / name for run in runs] + [tmp_path / "cache" / "code" / name]
    assert len({file.stat().st_ino for file in files}) == 1
    # As in another process.
    before = files[0].read_bytes()
    forget_code()
    os.utime(code / "launch.py", (0, 0))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    files[2].unlink()
    other = run_folder(tmp_path / "c")
    save_code_snapshot(other)
    assert (other.code / name).read_bytes() == before
    assert [file.name for run in [*runs, other] for file in run.code.iterdir()] == [name] * 3


def test_runs_without_links_or_cache_have_a_copy(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise OSError("there are no links here")

        patch.setattr(os, "link", refuse)
        name = f"{save_code_snapshot(first)['code']}.zip"
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "no_folder"))
    save_code_snapshot(second)
    for run in (first, second):
        assert read_code(run.code / name) == FILES
        assert [file.name for file in run.code.iterdir()] == [name]


def test_later_edits_are_not_in_the_snapshot(code: Path, tmp_path: Path) -> None:
    first = save_code_snapshot(run_folder(tmp_path / "a"))
    (code / "launch.py").write_text("print(2)\n")
    assert save_code_snapshot(run_folder(tmp_path / "b"))["code"] == first["code"]


def test_edits_during_data_preparation_are_not_in_the_snapshot(code: Path, tmp_path: Path) -> None:
    record_code()
    (code / "launch.py").write_text("print(2)\n")
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    assert read_code(run.code / f"{about['code']}.zip") == FILES
    assert hash_running_code(run) == about["code"]


def test_user_modules_are_copied_without_data_files(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = write(tmp_path / "lab", {"my_lab/__init__.py": b"", "my_lab/mixers.py": b"x = 1\n", "other.py": b""})
    (lab / "my_lab" / "weights.bin").write_bytes(b"\0" * (code_snapshot.MAX_FILE_BYTES + 1))
    monkeypatch.chdir(lab)
    monkeypatch.syspath_prepend(str(lab))
    for name in ("my_lab", "my_lab.mixers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    __import__("my_lab.mixers")
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    own = {"my_lab/__init__.py": b"", "my_lab/mixers.py": b"x = 1\n"}
    assert read_code(run.code / f"{about['code']}.zip") == FILES | own
    assert about["left_out"] == ["my_lab/weights.bin"]
    # Jobs of a sweep run a complete copy.
    copy = sweep_folders.save_code_snapshot(sweep_folders.SweepDir(tmp_path / "sweep"))
    assert contents(copy).keys() == {*FILES, *own, "my_lab/weights.bin"}
    for name in ("my_lab", "my_lab.mixers"):
        sys.modules.pop(name)


@pytest.mark.parametrize("is_installed", [False, True])
def test_components_in_the_config_are_copied_from_any_folder(
    is_installed: bool, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = write(
        tmp_path / "lab", {"far_lab/__init__.py": b"", "far_lab/mixers.py": b"import far_help", "far_help.py": b""}
    )
    write(lab, {"not_imported.py": b""} | ({"far_lab-1.dist-info/METADATA": b""} if is_installed else {}))
    monkeypatch.syspath_prepend(str(lab))
    __import__("far_lab.mixers")
    run = run_folder(tmp_path / "run")
    run.config_file.write_text('{"config": {"model": {"mixers": ["softmax", "far_lab.mixers:Retention", "sys:path"]}}}')
    own = read_code(run.code / f"{save_code_snapshot(run)['code']}.zip").keys() - FILES.keys()
    assert own == (set() if is_installed else {"far_lab/__init__.py", "far_lab/mixers.py", "far_help.py"})
    for name in ("far_lab", "far_lab.mixers", "far_help"):
        sys.modules.pop(name)


def test_installed_packages_are_not_copied() -> None:
    assert user_modules({Path(os.__file__).parent, Path(hypothesis.__file__).parent.parent}) == []


def test_namespace_package_without_its_parent_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library leaves behind that removes its own package from sys.modules."""
    (tmp_path / "parent_package" / "inner").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    inner = importlib.import_module("parent_package.inner")
    monkeypatch.delitem(sys.modules, "parent_package")
    monkeypatch.syspath_prepend(tmp_path / "other")
    monkeypatch.setitem(sys.modules, "parent_package.inner", inner)
    assert user_modules({tmp_path / "absent"}) == []


# Reading archives.


@pytest.mark.parametrize("name", ["../outside.py", "/tmp/outside.py", "a/../../outside.py", ".."])
def test_archive_cannot_write_outside_the_target(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("launch.py", b"")
        archive.writestr(name, b"evil")
    with pytest.raises(UserError, match="outside of the target folder"):
        write_code(read_verified_code(tmp_path / "evil.zip"), tmp_path / "inside" / "folder")
    assert not (tmp_path / "inside").exists()


@given(some.floats(0, 1, exclude_max=True), some.sampled_from(["cut", "flip"]))
@hypothesis.settings(max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_damaged_archive_is_rejected(tmp_path_factory: pytest.TempPathFactory, place: float, damage: str) -> None:
    folder = tmp_path_factory.mktemp("damage")
    files = code_files([write(folder / "code", FILES) / name for name in code_snapshot.CODE])
    archive = folder / f"{code_hash(files)}.zip"
    with zipfile.ZipFile(archive, "w") as whole:
        for name, content in FILES.items():
            whole.writestr(name, content)
    whole_bytes = archive.read_bytes()
    at = int(place * len(whole_bytes))
    flipped = whole_bytes[:at] + bytes([whole_bytes[at] ^ 0x55]) + whole_bytes[at + 1 :]
    archive.write_bytes(whole_bytes[:at] if damage == "cut" else flipped)
    try:
        write_code(read_verified_code(archive), folder / "copy")
    except UserError:
        assert not (folder / "copy").exists()
    else:
        assert contents(folder / "copy") == FILES


def test_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.zip cannot be read: No such file"):
        write_code(read_verified_code(tmp_path / "gone.zip"), tmp_path)


# Git.


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(code: Path) -> Path:
    """A repository with all of the code committed."""
    git(code, "init", "-q", "-b", "trunk")
    (code / ".gitignore").write_text("__pycache__\n/runs\n")
    git(code, "add", ".")
    git(code, "commit", "-q", "-m", "first")
    return code


def test_clean_tree_has_a_commit_and_no_patch(repository: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    commit = git(repository, "rev-parse", "HEAD")
    assert about["git"] == {"commit": commit, "branch": "trunk", "clean": True, "patch": None, "untracked": []}
    assert len(list(run.code.iterdir())) == 1


def test_patch_turns_the_commit_into_the_running_code(repository: Path, tmp_path: Path) -> None:
    (repository / "README.md").write_text("what is not code does not matter")
    (repository / "launch.py").write_bytes(b"print(\x00\xff)\n")
    (repository / "configs" / "base.py").unlink()
    (repository / "rustgpt_jax" / "new.py").write_text("new = 1\n")
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)["git"]
    assert not about["clean"]
    assert about["untracked"] == ["rustgpt_jax/new.py"]
    patch = (run.code / about["patch"]).absolute()
    git(repository, "clone", "-q", str(repository), str(tmp_path / "clone"))
    git(tmp_path / "clone", "checkout", "-q", about["commit"])
    git(tmp_path / "clone", "apply", str(patch))
    for name in FILES:
        assert (tmp_path / "clone" / name).exists() == (repository / name).exists()
        if (repository / name).exists():
            assert (tmp_path / "clone" / name).read_bytes() == (repository / name).read_bytes()


def test_snapshot_works_without_git(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save_code_snapshot(run_folder(tmp_path / "no_repository"))["git"] is None
    # In a repository that does not contain the code.
    git(tmp_path, "init", "-q")
    code_snapshot._git_state.cache_clear()
    assert save_code_snapshot(run_folder(tmp_path / "not_in_it"))["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    code_snapshot._git_state.cache_clear()
    assert save_code_snapshot(run_folder(tmp_path / "no_git"))["git"] is None


def test_hanging_git_times_out(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(tmp_path, "exec sleep 30", monkeypatch)
    monkeypatch.setattr(code_snapshot, "GIT_SECONDS", 0.2)
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    assert about["git"] is None
    assert read_code(run.code / f"{about['code']}.zip") == FILES


def fake_git(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell script that replaces git."""
    (folder / "bin").mkdir()
    (folder / "bin" / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("command", ["diff", "status"])
def test_failing_git_status_is_not_called_clean(
    command: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("git")
    fake_git(tmp_path, f'case "$*" in *" {command} "*) exit 1;; esac; exec {real} "$@"', monkeypatch)
    about = save_code_snapshot(run_folder(tmp_path / "run"))["git"]
    assert about["clean"] is None and about["patch"] is None


def test_patch_ignores_the_users_git_settings(repository: Path, tmp_path: Path) -> None:
    (repository / ".git" / "info" / "attributes").write_text("*.py diff=shouting\n")
    for name, value in (("diff.external", "true"), ("diff.shouting.textconv", "tr a-z A-Z <"), ("color.ui", "always")):
        git(repository, "config", name, value)
    (repository / "launch.py").write_text("print('quiet')\n")
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)["git"]
    assert about["clean"] is False
    assert "\n+print('quiet')\n" in (run.code / about["patch"]).read_text()


def test_file_names_may_contain_any_bytes(repository: Path, tmp_path: Path) -> None:
    with open(os.fsencode(repository / "rustgpt_jax") + b"/gr\xfcn.txt", "w"):
        pass
    about = save_code_snapshot(run_folder(tmp_path / "run"))
    assert about["git"]["untracked"] == about["left_out"] == ["rustgpt_jax/gr\\xfcn.txt"]
    sweep_folders.save_code_snapshot(sweep_folders.SweepDir(tmp_path / "sweep"))


def test_copy_of_the_code_records_its_git_state(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "launch.py").write_text("print(2)\n")
    first = run_folder(tmp_path / "here")
    about = save_code_snapshot(first)
    copy = sweep_folders.save_code_snapshot(sweep_folders.SweepDir(tmp_path / "sweep"))
    # A job of a sweep, in another process.
    monkeypatch.setattr(code_snapshot, "_root", lambda: copy)
    forget_code()
    trial = run_folder(tmp_path / "trial")
    assert save_code_snapshot(trial) == about and about["git"]["clean"] is False
    assert contents(trial.code) == contents(first.code)


# Files that are not copied.

SECRETS = (".env", "prod.env", "id_rsa", "id_ed25519.pub", "server.pem", "api.key", "my_Secrets.py", ".aws/config")


def kept_names(run: RunDir, about: dict[str, Any]) -> set[str]:
    return set(read_code(run.code / f"{about['code']}.zip"))


@pytest.mark.parametrize("is_tracked", [True, False])
def test_secrets_are_not_copied(is_tracked: bool, code: Path, tmp_path: Path) -> None:
    secrets = {f"{folder}/{name}": b"swordfish" for folder in ("configs", "experiments") for name in SECRETS}
    write(code, secrets)
    if is_tracked:
        git(code, "init", "-q")
        git(code, "add", "-f", ".")
        git(code, "commit", "-q", "-m", "all")
        write(code, dict.fromkeys(secrets, b"swordfish 2"))
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    assert kept_names(run, about) == FILES.keys()
    assert about["left_out"] == sorted(secrets)
    everything = b"".join(file.read_bytes() for file in run.code.iterdir())
    assert b"swordfish" not in everything and len(list(run.code.iterdir())) == 1
    copy = sweep_folders.save_code_snapshot(sweep_folders.SweepDir(tmp_path / "sweep"))
    assert {name for name in contents(copy) if not name.startswith(".git_state")} == FILES.keys()


def test_ignored_and_untracked_files_are_not_copied(repository: Path, tmp_path: Path) -> None:
    (repository / ".gitignore").write_text("__pycache__\n/runs\n*.csv\nlocal_*\n")
    added = {"configs/new.py": b"new = 1\n", "configs/local_paths.py": b"1", "experiments/people.csv": b"2"}
    write(repository, added | {"configs/notes.txt": b"3"})
    os.symlink(tmp_path / "elsewhere.py", repository / "configs" / "link.py")
    (tmp_path / "elsewhere.py").write_text("swordfish")
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    assert kept_names(run, about) == FILES.keys() | {"configs/new.py"}
    left_out = ["configs/link.py", "configs/local_paths.py", "configs/notes.txt", "experiments/people.csv"]
    assert about["left_out"] == left_out
    assert hash_running_code(run) == about["code"]


def test_modules_of_an_ignored_package_are_copied(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / ".git" / "info" / "exclude").write_text("ignored_lab/\n")
    files = {"ignored_lab/__init__.py": b"", "ignored_lab/data.bin": b"4", "ignored_lab/id_rsa": b"5"}
    write(repository, files)
    monkeypatch.syspath_prepend(str(repository))
    __import__("ignored_lab")
    run = run_folder(tmp_path / "run")
    about = save_code_snapshot(run)
    sys.modules.pop("ignored_lab")
    assert kept_names(run, about) == FILES.keys() | {"ignored_lab/__init__.py"}
    assert about["left_out"] == ["ignored_lab/data.bin", "ignored_lab/id_rsa"]


def test_copy_for_jobs_in_an_ignored_folder_is_complete(repository: Path, tmp_path: Path) -> None:
    """Jobs of a sweep run a copy in a folder that git ignores."""
    copy = sweep_folders.save_code_snapshot(sweep_folders.SweepDir(repository / "runs" / "sweep"))
    assert set(code_files([copy / name for name in code_snapshot.CODE])) == FILES.keys()


def test_modified_copy_in_the_cache_is_not_linked(code: Path, tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    name = f"{save_code_snapshot(first)['code']}.zip"
    (first.code / name).write_bytes(b"changed")
    save_code_snapshot(second)
    assert read_code(second.code / name) == FILES


@pytest.mark.parametrize("other", ["permissions", "group"])
def test_copy_with_other_group_or_permissions_is_not_linked(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """A hard link keeps the group of the cache, also in a setgid folder, whose members could not read the code."""
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    name = f"{save_code_snapshot(first)['code']}.zip"
    second.code.mkdir()
    if other == "permissions":
        second.code.chmod(0o700)
    else:
        group = os.getegid()
        monkeypatch.setattr(os, "getegid", lambda: group + 1)
    save_code_snapshot(second)
    assert not (second.code / name).samefile(first.code / name)
    assert read_code(second.code / name) == FILES


def test_copy_for_jobs_respects_the_umask(code: Path, tmp_path: Path) -> None:
    (code / "launch.py").chmod(0o600)
    copy = sweep_folders.save_code_snapshot(sweep_folders.SweepDir(tmp_path / "sweep"))
    (tmp_path / "new").write_text("")
    assert (copy / "launch.py").stat().st_mode == (tmp_path / "new").stat().st_mode
