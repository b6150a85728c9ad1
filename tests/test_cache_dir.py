"""The cache folder: its limit is read as one would expect, and where it cannot be written, its setting is named."""

from pathlib import Path

import jax
import pytest
from conftest import small_config

from rustgpt_jax.cache_dir import LIMIT, MOST_BYTES, cache_limit
from rustgpt_jax.data.token_store import build_store
from rustgpt_jax.errors import UserError
from rustgpt_jax.sharding import compilation_cache
from rustgpt_jax.sharding.compilation_cache import enable_compilation_cache
from rustgpt_jax.tokenizers import train_tokenizer


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", MOST_BYTES),
        ("0", 0),
        ("123", 123),
        ("4G", 4 * 2**30),
        ("4g", 4 * 2**30),
        ("4GB", 4 * 2**30),
        (" 4 GiB ", 4 * 2**30),
        ("1.5M", 3 * 2**19),
        ("100k", 100 * 2**10),
        ("2T", 2 * 2**40),
        ("7B", 7),
    ],
)
def test_a_size_is_read_as_one_would_expect(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["plenty", "-1", "4X", "1e9", "4G4", "²", "G"])
def test_other_text_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(UserError, match=f"RUSTGPT_JAX_CACHE_BYTES='{text}' is not a size; use a value such as 4G"):
        cache_limit()


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that not even root can write."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(tmp_path / "file" / "cache"))
    return tmp_path / "file" / "cache"


def test_token_stores_that_cannot_be_written_name_the_setting(unwritable: Path) -> None:
    config = small_config(**{"tokenizer.name": "byte"})
    tokenizer = train_tokenizer(config.tokenizer, iter(()))
    with pytest.raises(UserError, match=r"\(Not a directory\). RUSTGPT_JAX_CACHE=DIR moves the cache"):
        build_store(config.data, tokenizer, unwritable / "stores")


@pytest.mark.parametrize("is_there", [False, True])
def test_programs_that_cannot_be_kept_are_said_once(
    is_there: bool, unwritable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_there:
        folder = unwritable.parent.with_name("there") / "programs"
        folder.mkdir(parents=True)
        monkeypatch.setenv("RUSTGPT_JAX_CACHE", str(folder.parent))
        monkeypatch.setattr(compilation_cache.os, "access", lambda *_: False)
    changed: dict[str, object] = {}
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", changed.__setitem__)
        enable_compilation_cache()
    jax.config.update("jax_compilation_cache_dir", before)
    said = capsys.readouterr().err
    assert "so compiled programs are not cached. RUSTGPT_JAX_CACHE=DIR moves the cache.\n" in said
    assert ("Permission denied" if is_there else "Not a directory") in said and said.count("\n") == 1
    # What is there is read; JAX does not try to write, which would warn at every program.
    assert ("jax_compilation_cache_dir" in changed) == is_there
    assert changed["jax_persistent_cache_min_compile_time_secs"] == float("inf")
