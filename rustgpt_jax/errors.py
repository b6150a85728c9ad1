"""How a user's mistake is answered: one sentence that says what, where, and the nearest right answer."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a command line or a file. Its text is one clear sentence, shown without a traceback."""


def suggestion(name: str, valid: Iterable[str]) -> str:
    """What to say after a wrong name: the nearest valid one if there is one, and all of them if they are few."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Valid names: {', '.join(valid)}." if 0 < len(valid) <= 12 else ""
    return hint + listed
