"""Sums and differences of numbers up to 20, and counting."""

from typing import Final

from .chat import Chat, Phrasings, matches, says
from .words import UNITS

ADD: Final = Phrasings(
    trained=(
        "[What is|What's|How much is|Calculate|Compute|Tell me|] {a} [+|plus] {b}[?|]",
        "{a} [+|plus] {b} [=|is][?|]", "{a}+{b}[=|?|]", "Add {a} [and|to] {b}[.|]",
        "[What is|Give me|Calculate|Tell me] the sum of {a} and {b}[.|?]", "[Can|Could] you add {a} and {b}?",
        "[How much|What] do {a} and {b} [make|give]?", "[How much|What] is {a} and {b}[ together|]?",
        "{a} and {b} make[s|] what?", "I have {a} apples and get {b} more. How many do I have?",
        "What do you get if you add {a} and {b}?", "Do you know what {a} [+|plus] {b} is?",
        "Sum up {a} and {b}.",
    ),
    held_out=(
        "Please add {a} and {b} for me.", "Could you tell me what {a} plus {b} is?",
        "How much do I get for {a} + {b}?", "I need the sum of {a} and {b}.", "Work out {a} + {b}.",
        "Let us add: what is {a} + {b}?",
    ),
)  # fmt: skip
SUBTRACT: Final = Phrasings(
    trained=(
        "[What is|What's|How much is|Calculate|Compute|Tell me|] {a} [-|minus] {b}[?|]",
        "{a} [-|minus] {b} [=|is][?|]", "{a}-{b}[=|?|]",
        "[What is|Give me|Calculate|Tell me] {a} less {b}[.|?]",
        "[Can|Could] you [subtract|take] {b} from {a}?", "[Subtract|Take] {b} from {a}[.|]",
        "Take {b} away from {a}[.|]", "What do you get if you [subtract|take] {b} from {a}?",
        "I have {a} apples and eat {b}. How many are left?", "Do you know what {a} [-|minus] {b} is?",
        "What is left of {a} without {b}?", "What is {a} take away {b}?",
    ),
    held_out=(
        "Please subtract {b} from {a} for me.", "Could you tell me what {a} minus {b} is?",
        "How much do I get for {a} - {b}?", "Work out {a} - {b}.", "Let us subtract: what is {a} - {b}?",
    ),
)  # fmt: skip
BEYOND: Final = Phrasings(
    trained=(
        "[What is|How much is|Calculate|] {x} [+|-|plus|minus] {y}[?|]",
        "[What is|How much is|Calculate|] {a} [*|/|x|times|divided by] {b}[?|]",
        "[Multiply|Divide] {a} [and|by] {b}.", "What is the square root of {x}?",
        "What is {a} percent of {x}?", "Add {x} and {y}.", "Is {x} a prime number?", "What is {a} squared?",
        "Subtract {y} from {x}.",
    ),
    held_out=(
        "Could you multiply {a} and {b}?", "Please work out {x} + {y}.", "Could you tell me {a} times {b}?",
    ),
)  # fmt: skip
COUNT: Final = Phrasings(
    trained=(
        "[Count|Please count|Can you count|Could you count|Now count] to {b}[.|?|]", "Count up to {b}[.|]",
        "Count from 1 to {b}[.|]", "I want you to count to {b}.", "Let me hear you count to {b}.",
        "[Write|Say] the numbers up to {b}[.|]", "Show me how you count to {b}.",
        "Do you know how to count to {b}?", "Count until {b}[.|]",
    ),
    held_out=("Try to count to {b}.", "Would you count to {b} for me?", "Please count for me, up to {b}."),
)  # fmt: skip
COUNT_FROM: Final = Phrasings(
    trained=(
        "[Count|Please count|Can you count|Could you count|Now count] from {a} to {b}[.|?|]",
        "Count from {a} up to {b}[.|]", "[Write|List|Say|Give me] the numbers from {a} to {b}[.|]",
        "[Can you|Could you|] say the numbers from {a} to {b}[?|]", "I want you to count from {a} to {b}.",
        "Let me hear you count from {a} to {b}.", "Which numbers are there from {a} to {b}?",
        "Numbers from {a} to {b}[, please|].", "Show me how you count from {a} to {b}.",
    ),
    held_out=(
        "Would you count from {a} to {b} for me?", "Could you list the numbers from {a} to {b}?",
        "Let us count from {a} to {b}.",
    ),
)  # fmt: skip
COUNT_DOWN: Final = Phrasings(
    trained=(
        "[Count|Please count|Can you count] [down|back|backwards] from {a}[ to 1|][.|?|]",
        "Count from {a} down to 1[.|]", "Give me a countdown from {a}[.|]", "Start a countdown from {a}[.|]",
    ),
    held_out=("Could you count down from {a}?", "I would like a countdown from {a}."),
)  # fmt: skip

BEYOND_ANSWER: Final = "That is too hard for me: I can only add and subtract numbers up to 20."


def _written(chat: Chat, number: int) -> str:
    """Mostly in digits."""
    return UNITS[number] if chat.rng.random() < 0.05 else str(number)


def _operand(chat: Chat) -> int:
    return chat.rng.randint(0, chat.rng.choice([10, 20]))


def add(chat: Chat) -> None:
    a, b = _operand(chat), _operand(chat)
    slots = {"a": _written(chat, a), "b": _written(chat, b)}
    chat.ask(ADD, f"{a} + {b} = {a + b}.", matches(rf"(?<![\d-]){a + b}\.?$"), **slots)


def subtract(chat: Chat) -> None:
    a, b = _operand(chat), _operand(chat)
    if a < b and chat.rng.random() < 0.7:
        a, b = b, a
    slots = {"a": _written(chat, a), "b": _written(chat, b)}
    chat.ask(SUBTRACT, f"{a} - {b} = {a - b}.", matches(rf"(?<![\d-]){a - b}\.?$"), **slots)


def beyond(chat: Chat) -> None:
    rng = chat.rng
    x, y = rng.choice([rng.randint(21, 99), rng.randint(100, 9999)]), rng.randint(2, 999)
    slots = {"a": rng.randint(2, 99), "b": rng.randint(2, 20), "x": x, "y": y}
    chat.ask(BEYOND, BEYOND_ANSWER, says("too hard"), **slots)


def count(chat: Chat) -> None:
    rng = chat.rng
    first, last, phrasings = rng.choice([
        (1, rng.randint(3, 20), COUNT),
        (first := rng.randint(0, 15), first + rng.randint(2, 11), COUNT_FROM),
        (rng.randint(3, 12), 1, COUNT_DOWN),
    ])  # fmt: skip
    numbers = range(first, last + 1) if first < last else range(first, last - 1, -1)
    answer = ", ".join(map(str, numbers))
    slots = {"a": first, "b": _written(chat, last) if last <= 20 else last}
    chat.ask(phrasings, f"{answer}.", matches(rf"^{answer}\.?$"), **slots)
