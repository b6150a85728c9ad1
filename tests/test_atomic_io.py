"""Atomic writes: no partial files, no leftovers, and permissions by the umask."""

import errno
import os
from pathlib import Path

import pytest

from rustgpt_jax.atomic_io import atomic_file, atomic_folder, publish_folder, write_atomically
from rustgpt_jax.errors import UserError


def test_a_failed_write_keeps_the_old_file_and_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "notes.txt"
    write_atomically(file, "old ü")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"notes.txt cannot be written: No space left"):
        write_atomically(file, "new")
    assert file.read_text(encoding="utf-8") == "old ü"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_write_into_no_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(UserError, match="cannot be written"):
            write_atomically(tmp_path / folder / "a.json", "{}")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_written_files_have_the_permissions_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", "content")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_failed_block_leaves_neither_file_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "file") as file:
        file.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a" / "folder") as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
    with pytest.raises(UserError, match="folder already exists and is not empty"), atomic_folder(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


def test_the_first_valid_folder_stays_and_an_invalid_one_is_replaced(tmp_path: Path) -> None:
    def is_valid(folder: Path) -> bool:
        return (folder / "file").read_text() != "damaged"

    for content in ("damaged", "first", "second"):
        (tmp_path / "temporary").mkdir(exist_ok=True)
        (tmp_path / "temporary" / "file").write_text(content)
        publish_folder(tmp_path / "temporary", tmp_path / "folder", is_valid)
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "temporary"]
