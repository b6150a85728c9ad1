"""Documents and the messages they are made of."""

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one speaker says. The role is 'text' (plain text), 'system', 'user' or 'assistant'."""

    role: str
    text: str

    @property
    def is_learned_as_answer(self) -> bool:
        """Whether its words are learned when config.data.loss_mask is 'assistant'."""
        return self.role in ("text", "assistant")


@dataclass(frozen=True)
class Document:
    """One plain text (a single turn with the role 'text') or one dialogue. The name says where it came from."""

    name: str
    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        """The texts of all turns, one after another."""
        return "".join(turn.text for turn in self.turns)

    @property
    def is_dialogue(self) -> bool:
        """Whether anyone speaks in it."""
        return any(turn.role != "text" for turn in self.turns)


def plain(name: str, text: str) -> Document:
    """A document of plain text."""
    return Document(name, (Turn("text", text),))
