"""What the skills share: a conversation that grows, phrasings, and how an answer is graded."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from . import words

Message = dict[str, Any]
"""As in a request to `/v1/chat/completions`."""
Right = Callable[[Message], bool]
"""Whether an assistant's message is a right answer."""

_CHOICE: Final = re.compile(r"\[([^\[\]]*)\]")
OPENINGS: Final = (
    "Please: ", "Hey, ", "Hi! ", "Hello. ", "Ok, ", "So, ", "Now, ", "Well, ", "Thanks. ", "Great! ",
    "One more thing: ", "Next question: ",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Ways to say one thing, `[a|b]` being a choice and `{x}` a slot. `held_out` is never trained on."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    def pick(self, rng: random.Random, *, held_out: bool) -> str:
        phrasing = rng.choice(self.held_out if held_out else self.trained)
        return _CHOICE.sub(lambda choice: rng.choice(choice[1].split("|")), phrasing)

    def all(self, *, held_out: bool) -> Iterator[str]:
        """Each wording that `pick` can give."""
        for phrasing in self.held_out if held_out else self.trained:
            texts, choices = _CHOICE.split(phrasing)[::2], _CHOICE.split(phrasing)[1::2]
            for chosen in itertools.product(*(choice.split("|") for choice in choices)):
                yield texts[0] + "".join(a + b for a, b in zip(chosen, texts[1:], strict=True))


@dataclass(slots=True)
class Chat:
    """A conversation, and what was said in it. `right` grades its last answer."""

    rng: random.Random
    held_out: bool = False
    """Whether it is an examination: phrasings, names, colours and cities that are never trained on."""
    rough: bool = False
    """Whether some questions are shouted, or begin with words that mean nothing."""
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    name: str | None = None
    colour: str | None = None
    manner: str = ""
    """What the system message wants each answer to begin with."""
    told: list[str] = field(default_factory=list)
    """Jokes."""
    country: bool = False
    """Whether the last question was about a capital."""
    right: Right = bool

    def phrase(self, phrasings: Phrasings, **slots: object) -> str:
        text = phrasings.pick(self.rng, held_out=self.held_out).format(**slots)
        return text if self.held_out else self._as_typed(text, {str(slot) for slot in slots.values()})

    def _as_typed(self, text: str, slots: set[str]) -> str:
        """People write in haste: what stands in slots stays as it is."""
        rng = self.rng
        if self.rough and rng.random() < 0.08:
            opening = f"{rng.choice(words.VERBS)} {rng.choice(words.FUNCTION_WORDS)}".capitalize()
            return f"{opening}{rng.choice([' ', ': ', ', '])}{text[0].lower()}{text[1:]}"
        if self.rough and rng.random() < 0.08 and all(slot == slot.upper() for slot in slots):
            return text.upper()
        if rng.random() < 0.12:
            text = rng.choice(OPENINGS) + text
        if rng.random() < 0.2 and not any(slot in text and slot != slot.lower() for slot in slots):
            text = text.lower()
        elif rng.random() < 0.1:
            text = text[0].lower() + text[1:]
        if rng.random() < 0.2:
            text = text.rstrip("?.!")
        elif rng.random() < 0.08 and text[-1] in ".?!":
            text = text[:-1] + rng.choice([", please", " please", "!", "??", " "]) + text[-1]
        return text

    def ask(self, phrasings: Phrasings, answer: str, right: Right, **slots: object) -> None:
        """A turn of the user and the answer to it."""
        self.say(self.phrase(phrasings, **slots), answer, right)

    def say(self, question: str, answer: str, right: Right) -> None:
        self.messages.append({"role": "user", "content": question})
        self.answer(answer, right)

    def answer(self, answer: str, right: Right) -> None:
        self.messages.append({"role": "assistant", "content": self.manner + answer})
        self.right = right
        self.country = False

    def new_name(self) -> str:
        if self.held_out:
            return self.rng.choice(words.UNSEEN_NAMES)
        known = self.rng.random() < 0.5
        name = self.rng.choice(words.NAMES) if known else words.invented(self.rng).capitalize()
        return name.lower() if self.rng.random() < 0.1 else name

    def new_colour(self) -> str:
        rng = self.rng
        if self.held_out:
            return rng.choice(words.UNSEEN_COLOURS)
        if rng.random() < 0.3:
            return words.invented(rng)
        colour = rng.choice(words.COLOURS)
        return f"{rng.choice(words.SHADES)} {colour}" if rng.random() < 0.2 else colour

    def new_city(self) -> str:
        rng = self.rng
        if self.held_out:
            return rng.choice(words.UNSEEN_CITIES)
        if rng.random() < 0.3:
            return words.invented(rng).capitalize()
        return rng.choice(rng.choice([words.CITIES, list(words.CAPITALS.values())]))


def says(*parts: str) -> Right:
    """Whether the answer has each of the parts, in any case."""
    return lambda message: all(part.lower() in (message["content"] or "").lower() for part in parts)


def matches(pattern: str) -> Right:
    return lambda message: re.search(pattern, message["content"] or "") is not None


def is_person(name: str | None = None, age: int | None = None) -> Right:
    """Whether the answer is a JSON object of a name and an age, and these where they are given."""

    def right(message: Message) -> bool:
        try:
            person = json.loads(message["content"] or "")
        except json.JSONDecodeError:
            return False
        return (
            isinstance(person, dict)
            and isinstance(person.get("name"), str)
            and isinstance(person.get("age"), int)
            and name in (None, person["name"])
            and age in (None, person["age"])
        )

    return right


def calls(function: str, **arguments: object) -> Right:
    """Whether the answer is one call of the function with these arguments."""

    def right(message: Message) -> bool:
        made = [call["function"] for call in message.get("tool_calls") or []]
        return [(call["name"], json.loads(call["arguments"])) for call in made] == [(function, arguments)]

    return right
