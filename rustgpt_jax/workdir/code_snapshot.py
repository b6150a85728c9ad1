"""Code snapshots: each run keeps an archive of the code that produced it, so that it can be reproduced.

An archive is named by the hash of the names and contents of its files. It is written once to the user's cache folder,
and hard-linked into the folders of runs.
"""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import rustgpt_jax
from rustgpt_jax.atomic_io import NotWritableError, temporary_path, write_atomically
from rustgpt_jax.cache_dir import cache_folder
from rustgpt_jax.errors import UserError
from rustgpt_jax.registry import IMPORT_PATH, search_path
from rustgpt_jax.workdir.run_dir import RunDir

CODE = ("rustgpt_jax", "configs", "experiments", "launch.py", "pyproject.toml")
HASH_DIGITS = 12
# Larger files next to the user's modules are not considered code.
MAX_FILE_BYTES = 2**23
GIT_SECONDS = 10
# Files in a copy of the code that record the git commit it was made from.
GIT_STATE, GIT_PATCH = ".git_state.json", ".git_state.patch"
# Lower-case name patterns of files and folders that are never copied because they look like secrets or are hidden.
DENIED = (
    *(".*", "*.env", "_netrc", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12"),
    *("*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.asc", "*secret*", "*credential*", "*passwd*"),
    "*password*",
)
BYTECODE = ("__pycache__", "*.pyc")
# Maximum number of skipped files to list in the event log.
MAX_LEFT_OUT = 100
# Maximum unpacked size of an archive, in bytes.
MAX_UNPACKED_BYTES = 2**29
# A fixed modification time, the earliest in the zip format, so that equal files give equal archives.
MODIFIED = (1980, 1, 1, 0, 0, 0)


def save_code_snapshot(run: RunDir) -> dict[str, Any]:
    """Save the running code in a run folder.

    Returns:
        The event fields that describe the code: its hash and its git commit. `left_out` lists files next to the code
        that were not copied because git ignores or does not track them, their names look like secrets, they are too
        large to be code, or their names are not valid UTF-8.

    Raises:
        UserError: The folder is not writable.
    """
    code, archive, left_out = _build_archive(_sources_of(run))
    git, patch = _git_state(_root())
    try:
        run.code.mkdir(exist_ok=True)
        _link_or_copy(f"{code}.zip", archive, run.code)
        if git is not None and git["patch"] is not None:
            _link_or_copy(git["patch"], patch, run.code)
    except OSError as error:
        raise UserError(f"{run.code} cannot be written: {error.strerror}.") from error
    return {"code": code, "left_out": left_out, "git": git}


def record_code() -> None:
    """Read the running code, so that later edits do not affect its snapshot. Takes a few milliseconds.

    Call this when the user's components are imported. Modules that are imported later are read when they are saved.
    """
    for source in code_sources():
        _read_source(source)


def hash_running_code(run: RunDir) -> str:
    """Return the hash of the running code with the components of a run, as `save_code_snapshot` would record it."""
    return _build_archive(_sources_of(run))[0]


def read_verified_code(archive: Path) -> dict[str, bytes]:
    """Read the files of an archive like `read_code`, and verify them against the hash in the archive's name.

    Raises:
        UserError: The archive is damaged, does not match its name, or has a file that would be written outside the
            target folder.
    """
    contents = read_code(archive)
    for name in contents:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UserError(f"{archive} has a file {name!r}, which would be written outside of the target folder.")
    found = _digest(sorted(contents.items()))
    if found != archive.stem:
        raise UserError(f"{archive} was modified: its files have the hash {found}.")
    return contents


def write_code(contents: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of an archive, as returned by `read_verified_code`, into a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read_code(archive: Path) -> dict[str, bytes]:
    """Read the files of an archive into a mapping from name to content.

    Raises:
        UserError: The archive is missing, too large, or damaged.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            size = sum(entry.file_size for entry in file.infolist())
            if size > MAX_UNPACKED_BYTES:
                raise UserError(f"{archive} is too large to be code: {size:,} bytes when unpacked.")
            return {name: file.read(name) for name in file.namelist()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{archive} cannot be read: {error.strerror}.") from error
    # Damaged archives make zipfile and zlib raise errors of many kinds.
    except Exception as error:
        raise UserError(f"{archive} is damaged: {error}.") from error


def list_differing_files(contents: Mapping[str, bytes]) -> list[str]:
    """Return the files of an archive that differ from what would be imported here, without importing anything."""
    places = {top: _local_path(top) for top in {PurePosixPath(name).parts[0] for name in contents}}

    def is_installed(name: str, content: bytes) -> bool:
        top, *rest = PurePosixPath(name).parts
        place = places[top]
        file = None if place is None else place.joinpath(*rest)
        return file is not None and file.is_file() and file.read_bytes() == content

    return sorted(name for name, content in contents.items() if not is_installed(name, content))


def _local_path(top: str) -> Path | None:
    """Return the local path of a top-level name of an archive, or None if it does not exist here."""
    if top in _code_names():
        return _root() / top
    folders = [Path(entry) for entry in search_path()]
    return next((folder / top for folder in folders if (folder / top).exists()), None)


# Source files.


def code_sources(parts: Iterable[str] = ()) -> list[Path]:
    """Return the files and folders of the running code: this package, and the user's modules.

    Args:
        parts: Imported modules with components. These, the modules next to them, and the modules in the current folder
            count as the user's.
    """
    root = _root()
    sources = (_module_source(sys.modules[name]) for name in parts if name in sys.modules)
    folders = {source.parent for source in sources if source is not None}
    user_folders = {folder for folder in folders if not _is_site_packages(folder)}
    own_folders = {Path.cwd()} if _is_site_packages(root) else {root, Path.cwd()}
    return [root / name for name in _code_names()] + user_modules(own_folders | user_folders)


def code_files(sources: Sequence[Path]) -> dict[str, Path]:
    """Return a sorted mapping from the path in the snapshot to the source file."""
    return {name: file for name, file in _files_by_name(sources).items() if file is not None}


def _files_by_name(sources: Sequence[Path]) -> dict[str, Path | None]:
    """Return the source files by their names in the copy, in order, with None for files that must not be copied."""
    found: dict[str, Path | None] = {}
    for source in sources:
        for file, is_kept in _iter_files(source):
            found[file.relative_to(source.parent).as_posix()] = file if is_kept else None
    return dict(sorted(found.items(), key=lambda item: item[0]))


def code_hash(files: Mapping[str, Path]) -> str:
    """Return a hash of the names and contents of the source files, which names the archive."""
    return _digest((name, file.read_bytes()) for name, file in files.items())


def user_modules(folders: set[Path]) -> list[Path]:
    """Return the imported modules and packages in some folders, except for installed ones and this package."""
    folders = folders - {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    found, own_names = [], _code_names()
    for name, module in list(sys.modules.items()):
        source = _module_source(module)
        if "." not in name and source is not None and source.parent in folders and source.name not in own_names:
            found.append(source)
    return sorted(found)


def _module_source(module: ModuleType) -> Path | None:
    """Return the file of a module or the folder of a package, or None for a built-in module."""
    file = vars(module).get("__file__")
    if not file:
        # A package without an __init__.py has only a __path__, which raises KeyError if its parent is no longer loaded.
        with suppress(KeyError):
            file = next(iter(vars(module).get("__path__", [])), None)
    source = None if file is None else Path(file)
    return source.parent if source is not None and source.name == "__init__.py" else source


def _sources_of(run: RunDir) -> tuple[Path, ...]:
    config = run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else ""
    parts = {module.partition(".")[0] for module, _ in IMPORT_PATH.findall(config)}
    return tuple(code_sources(sorted(parts)))


def _root() -> Path:
    return Path(rustgpt_jax.__file__).parent.parent


def _code_names() -> tuple[str, ...]:
    """Return the names of this package and of its files beside it; an installed package contains its recipes."""
    return CODE[:1] if (_root() / CODE[0] / "configs").is_dir() else CODE


def _is_site_packages(folder: Path) -> bool:
    return any(folder.glob("*.dist-info"))


def _iter_files(source: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the files of a source, except bytecode, each with whether it may be copied."""
    files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
    tracked = _git_filter(source) if files else None
    for file in files:
        names = file.relative_to(source.parent).parts
        if not _matches_any(names, BYTECODE):
            # A link must not point to a target outside the source.
            is_inside = not file.is_symlink() or file.resolve().is_relative_to(source.resolve())
            yield file, is_inside and not _matches_any(names, DENIED) and (tracked is None or tracked(file))


def _matches_any(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for name in names for pattern in patterns)


def _git_filter(source: Path) -> Callable[[Path], bool] | None:
    """Return a function that tests whether git allows a file to be copied, or None if git imposes no restriction.

    If the source is not ignored, these are the tracked files and the Python modules that are not ignored, or all files
    of a folder that has no tracked files. If the source is ignored as a whole, as users' own modules often are, these
    are its Python modules.
    """
    folder, names = (source.parent, [source.name]) if source.is_file() else (source, ["."])
    is_installed = any(folder.is_relative_to(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    if is_installed or _is_site_packages(source.parent) or (source.parent / GIT_STATE).exists():
        return None
    listed = _git(folder, "ls-files", "-t", "-z", "--cached", "--others", "--exclude-standard", "--", *names)
    if listed is None:
        return None
    entries = [os.fsdecode(line).split(" ", 1) for line in listed.split(b"\0") if line]
    known = {folder / name for tag, name in entries}
    kept = {folder / name for tag, name in entries if tag != "?"}
    if not known and _git(folder, "check-ignore", "-q", ".") is not None:
        return lambda file: file.suffix == ".py"
    return lambda file: file in known and (not kept or file in kept or file.suffix == ".py")


def _digest(contents: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(name.encode(errors="surrogateescape") + b"\0" + content + b"\0")
    return digest.hexdigest()[:HASH_DIGITS]


# Archives.


@cache
def _build_archive(sources: tuple[Path, ...]) -> tuple[str, bytes, list[str]]:
    """Return the hash of the code, its archive, and the names of skipped files."""
    every = {name: content for source in sources for name, content in _read_source(source).items()}
    left_out = sorted(name for name, content in every.items() if content is None)
    if len(left_out) > MAX_LEFT_OUT:
        left_out[MAX_LEFT_OUT:] = [f"and {len(left_out) - MAX_LEFT_OUT} more"]
    contents = {name: content for name, content in sorted(every.items()) if content is not None}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name, MODIFIED), content, zipfile.ZIP_DEFLATED)
    return _digest(contents.items()), packed.getvalue(), left_out


@cache
def _read_source(source: Path) -> dict[str, bytes | None]:
    """Return the files of a source by their names in an archive, with None for skipped files.

    They are read only once, so that later edits do not affect the copy of the running code.
    """
    return {_escape_name(name): _read_file(name, file) for name, file in _files_by_name([source]).items()}


def _read_file(name: str, file: Path | None) -> bytes | None:
    if file is None or _escape_name(name) != name:
        return None
    try:
        return file.read_bytes() if file.stat().st_size <= MAX_FILE_BYTES else None
    except OSError:  # No permission to read.
        return None


def _escape_name(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _link_or_copy(name: str, content: bytes, folder: Path) -> None:
    """Write a file into a folder as a hard link to a copy in the cache folder, or else as a copy."""
    if (folder / name).exists():
        return
    partial, shared = temporary_path(folder / name), cache_folder() / "code" / name
    try:
        # Anyone with write access to a run folder could have changed the copy that it is hard-linked to.
        if not shared.exists() or shared.read_bytes() != content:
            shared.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(shared, content)
        if _has_same_access(folder, shared):
            os.link(shared, partial)
            partial.replace(folder / name)
        else:
            write_atomically(folder / name, content)
    except (OSError, NotWritableError):
        write_atomically(folder / name, content)


def _has_same_access(folder: Path, file: Path) -> bool:
    """Return whether a file has the group and permissions that a new file in a folder would have.

    A setgid folder gives its own group to new files, but not to hard links.
    """
    there, here = folder.stat(), file.stat()
    group = there.st_gid if there.st_mode & stat.S_ISGID else os.getegid()
    permissions = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
    return here.st_gid == group and (there.st_mode ^ here.st_mode) & permissions == 0


# Git state.


def write_git_state(copy: Path) -> None:
    """Write the git state of the running code into a copy of it, for runs that execute the copy."""
    about, patch = _git_state(_root())
    if about is not None:
        (copy / GIT_PATCH).write_bytes(patch)
        (copy / GIT_STATE).write_text(json.dumps(about))


@cache
def _git_state(root: Path) -> tuple[dict[str, Any] | None, bytes]:
    """Return the git commit, branch, untracked files and local changes of the code, and a patch with the changes.

    `clean` is None if git cannot determine whether there are changes.
    """
    if (root / GIT_STATE).exists():
        return json.loads((root / GIT_STATE).read_bytes()), (root / GIT_PATCH).read_bytes()
    if not _git(root, "ls-files", "--", CODE[0]):
        return None, b""
    status = _git(root, "status", "--porcelain=v2", "--branch", "-z", "--", *CODE)
    secrets = [f":(exclude,icase,glob)**/{pattern}{below}" for pattern in DENIED for below in ("", "/**")]
    plain = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv")
    patch = _git(root, "diff", *plain, "HEAD", "--", *CODE, *secrets)
    # File names may contain any bytes.
    lines = (status or b"").decode(errors="backslashreplace").split("\0")
    headers = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
    untracked = [line[2:] for line in lines if line.startswith("? ")]
    about = {
        "commit": headers.get("branch.oid"),
        "branch": headers.get("branch.head"),
        "clean": None if status is None or patch is None else not patch and not untracked,
        "patch": f"{hashlib.sha256(patch).hexdigest()[:HASH_DIGITS]}.patch" if patch else None,
        "untracked": untracked,
    }
    return about, patch or b""


def _git(root: Path, *arguments: str) -> bytes | None:
    """Return the output of a git command, or None without git or a repository."""
    try:
        # Do not wait for locks of other processes, and write nothing.
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
