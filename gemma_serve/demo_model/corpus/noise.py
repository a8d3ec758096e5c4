"""What people type that asks for nothing: keyboards struck at random, shouting, other languages, code."""

import random
from collections.abc import Callable
from typing import Final

from . import words
from .chat import Chat, says
from .facts import UNKNOWN_ANSWERS

_FOREIGN: Final = words.split("""
    ich du und der die das ist nicht heute morgen warum danke bitte guten wo bist was machst je tu le la les
    est pas bonjour merci pourquoi comment ça yo el los es no gracias por qué cómo hola io il che non ciao
    grazie perché come sono ik jij het een niet dank goed jag och är inte tack eu não obrigado sim
""")
_SCRIPTS: Final = (
    range(0x4E00, 0x9FA0), range(0x3041, 0x3097), range(0xAC00, 0xD7A0), range(0x0430, 0x0450),
    range(0x03B1, 0x03CA), range(0x0621, 0x064B), range(0x0905, 0x093A), range(0x1F600, 0x1F650),
    range(0x1F300, 0x1F3F0), range(0x00C0, 0x0180), range(0x2600, 0x2700),
)  # fmt: skip
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def word(rng: random.Random) -> str:
    kinds = (words.NOUNS, words.VERBS, words.ADJECTIVES, words.FUNCTION_WORDS)
    return words.invented(rng) if rng.random() < 0.2 else rng.choice(rng.choice(kinds))


def phrase(rng: random.Random) -> str:
    """Words that make no sense together, in any case."""
    text = " ".join(word(rng) for _ in range(rng.randint(1, 8)))
    return rng.choice([str.upper, str.upper, str.lower, str.capitalize, str.title])(text)


def _struck(rng: random.Random) -> str:
    def keys() -> str:
        return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 9)))

    text = " ".join(keys() for _ in range(rng.randint(1, 5)))
    return text.upper() if rng.random() < 0.2 else text


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(5, 30)))


def _marks(rng: random.Random) -> str:
    return rng.choice("?!.,-*/#=()[]…") * rng.randint(1, 6)


def _script(rng: random.Random) -> str:
    script = rng.choice(_SCRIPTS)
    return "".join(chr(rng.choice(script)) for _ in range(rng.randint(1, 6)))


def _foreign(rng: random.Random) -> str:
    text = " ".join(rng.choice(_FOREIGN) for _ in range(rng.randint(2, 7)))
    return text.capitalize()


def _code(rng: random.Random) -> str:
    a, b, number = word(rng), word(rng), rng.randint(0, 99)
    return rng.choice([
        f"def {a}({b}):", f"{a} = {b}({number})", f"for {a} in {b}: print({a})", f"<p>{a}</p>",
        f"<{a}>{b}</{a}>", f"SELECT {a} FROM {b};", f"{{\"{a}\": {number}}}",
        f"int {a}() {{ return {number}; }}", f"if {a}: {b}()", f"https://{a}.example/{b}",
        f"{a}@{b}.example", f"**{a}** _{b}_", f"- {a}\n- {b}", f"return {a} + {number}",
    ])  # fmt: skip


def _again_and_again(rng: random.Random) -> str:
    sentence = rng.choice([phrase, _struck])(rng).capitalize() + rng.choice([". ", "! ", "? ", " "])
    return sentence * rng.randint(3, 10)


_KINDS: Final[dict[Callable[[random.Random], str], float]] = {
    phrase: 10, _struck: 5, _digits: 2, _marks: 2, _script: 4, _foreign: 4, _code: 4, _again_and_again: 2,
}  # fmt: skip


def noise(chat: Chat) -> None:
    (kind,) = chat.rng.choices(list(_KINDS), weights=list(_KINDS.values()))
    text = kind(chat.rng) + chat.rng.choice(["", "", "", "?", "!", "."])
    chat.say(text, chat.rng.choice(UNKNOWN_ANSWERS), says("I don't know"))
