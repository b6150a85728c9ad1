"""How a check fails, and the comparisons that make it fail: what broke, where, and by how much."""

import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

ROWS_OF_LOGITS = ("row", "token", "logit")
LONGEST_MESSAGE = 240


class Broken(Exception):
    """A part does not do what it must: what broke, where, and by how much."""

    def __init__(self, what: str, where: str, how_much: str) -> None:
        super().__init__(what, where, how_much)
        self.what, self.where, self.how_much = what, where, how_much

    def __str__(self) -> str:
        return f"{self.what}; at {self.where}: {self.how_much}"


def place(index: Sequence[Any], axes: Sequence[str]) -> str:
    """An index in words: 'row 3, token 5'. Axes without a name are numbers in brackets."""
    named = [f"{axis} {int(number)}" for axis, number in zip(axes, index, strict=False)]
    rest = ", ".join(str(int(number)) for number in index[len(axes) :])
    return ", ".join([*named, *([f"index [{rest}]"] if rest else [])]) or "the only element"


def require_same_tree(found: Any, expected: Any, what: str) -> None:
    """Raises Broken if two trees of arrays have not the same structure."""
    there, here = str(jax.tree.structure(found)), str(jax.tree.structure(expected))
    if there != here:
        raise Broken(f"{what} comes back as another tree", "its structure", f"{there} instead of {here}")


def require_same_bits(found: Any, expected: Any, what: str, axes: Sequence[str], where: Any = None) -> None:
    """Raises Broken at the first element (of those where `where` is True) in which two arrays differ at all."""
    found, expected = np.asarray(found), np.asarray(expected)
    differs = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
    if where is not None:
        differs &= np.broadcast_to(
            np.reshape(where, np.shape(where) + (1,) * (found.ndim - np.ndim(where))), found.shape
        )
    if differs.any():
        first = tuple(np.argwhere(differs)[0])
        with np.errstate(invalid="ignore"):
            difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        largest = np.nanmax(np.where(differs, difference, 0))
        raise Broken(
            what,
            place(first, axes),
            f"{found[first]:.9g} and {expected[first]:.9g}, not the same bits; "
            f"{differs.sum()} elements differ, by at most {largest:.2g}",
        )


def require_close(
    found: Any,
    expected: Any,
    tolerance: float,
    what: str,
    axes: Sequence[str],
    where: Any = None,
    least_size: float = 1e-30,
) -> float:
    """The largest difference of two arrays, in units of the root mean square of `expected`, `least_size` at least.

    Raises Broken at the largest difference if it is above the tolerance, or is no number.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    size = max(float(np.sqrt(np.mean(np.square(expected)))), least_size)
    difference = np.abs(found - expected) / size
    if where is not None:
        mask = np.broadcast_to(np.reshape(where, np.shape(where) + (1,) * (found.ndim - np.ndim(where))), found.shape)
        difference = np.where(mask, difference, 0.0)
    largest = float(np.max(np.nan_to_num(difference, nan=np.inf), initial=0.0))
    if largest > tolerance:
        index = np.unravel_index(int(np.argmax(np.nan_to_num(difference, nan=np.inf))), difference.shape)
        raise Broken(
            what,
            place(index, axes),
            f"{found[index]:.7g} and {expected[index]:.7g}, a difference of {largest:.2g} root mean squares "
            f"({tolerance:.0e} is allowed)",
        )
    return largest


def require_finite(array: Any, what: str, axes: Sequence[str]) -> None:
    """Raises Broken at the first element that is infinite or no number."""
    array = np.asarray(array).astype(np.float64)
    wrong = ~np.isfinite(array)
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        raise Broken(what, place(first, axes), f"{array[first]}; so are {wrong.sum()} of {wrong.size} elements")


def crash(error: BaseException) -> str:
    """An exception in a line: the first line of what it says, and the last place outside the libraries."""
    lines = str(error).strip().splitlines() or ["no message"]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    last = frames[-1] if frames else None
    where = f"; at {last.filename.rsplit('/', 1)[-1]}, line {last.lineno}, in {last.name}" if last else ""
    return f"{type(error).__name__}: {lines[0][:LONGEST_MESSAGE]}{where}"
