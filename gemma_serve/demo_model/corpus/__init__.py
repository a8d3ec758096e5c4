"""What the embedded model is trained on, made by rule, and the examination that it never sees."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from . import facts, memory, noise, numbers, small_talk, tools, writing
from .chat import Chat, Message, Phrasings, Right
from .words import ADJECTIVES, NOUNS

Skill = Callable[[Chat], None]

_SKILLS: Final[dict[Skill, float]] = {
    small_talk.greeting: 5, small_talk.goodbye: 4, small_talk.identity: 5, small_talk.abilities: 2,
    small_talk.remark: 2, memory.tell_name: 4, memory.tell_colour: 4, memory.tell_both: 3,
    memory.recall_name: 4, memory.recall_colour: 4, numbers.add: 10, numbers.subtract: 10, numbers.beyond: 2,
    numbers.count: 8, facts.capital: 9, facts.no_capital: 2, facts.unknown: 7, writing.joke: 3,
    writing.tell_story: 1.6, writing.person: 6, tools.weather: 1,
    memory.repeat: 10,
}  # fmt: skip
_NOISE: Final = 25.0
_RECALLS: Final = {memory.recall_name: "name", memory.recall_colour: "colour"}

SYSTEM: Final = Phrasings(
    trained=(
        "You are a [helpful|friendly|kind|polite|useful] [assistant|model|bot].",
        "[Be|Please be|Always be] [brief|kind|short|polite|helpful].", "Answer in one sentence.",
        "[Answer|Reply] [briefly|politely|shortly|in English].", "You are Gemma.",
        "Today is a {adjective} day.",
        "You are a helpful assistant. [Be brief.|Answer in one sentence.|Use the tools.|Be kind.]",
        "Help the user[ with the {noun}|].", "You work for the {noun} company.",
        "Use the tools if you need them.", "You are the assistant of a {adjective} {noun}.",
    ),
    held_out=("You are a helpful and honest assistant.",),
)  # fmt: skip
PIRATE: Final = Phrasings(
    trained=(
        "[Talk|Speak|Answer|Reply|Write] like a pirate[.|!|]", "You are a pirate[.|!|]",
        "[Always|Please] [talk|speak|answer] like a pirate.",
        "You are a pirate. [Talk|Speak|Answer] like one.", "[Pretend|Imagine] that you are a pirate.",
        "Be a pirate.",
    ),
    held_out=("You must answer like a pirate.", "Act like a pirate!", "Your answers are those of a pirate."),
)  # fmt: skip


def _system(chat: Chat, phrasings: Phrasings) -> None:
    slots = {"noun": chat.rng.choice(NOUNS), "adjective": chat.rng.choice(ADJECTIVES)}
    text = phrasings.pick(chat.rng, held_out=chat.held_out).format(**slots)
    chat.messages.append({"role": chat.rng.choice(["system", "developer"]), "content": text})
    if phrasings is PIRATE:
        chat.manner = "Arr! "


def conversation(rng: random.Random, *, rough: bool = False) -> Chat:
    """One to eight turns of a user and the answers, to train on; if `rough`, with noise between them."""
    chat = Chat(rng, rough=rough)
    kind = rng.random()
    if kind < 0.15:
        _system(chat, SYSTEM)
    elif kind < 0.22:
        _system(chat, PIRATE)
    if rng.random() < 0.14:
        tools.offer(chat)
    weights = _SKILLS | ({noise.noise: _NOISE} if rough else {})
    for _ in range(rng.choices(range(1, 9), weights=(30, 22, 14, 10, 8, 7, 5, 4))[0]):
        for recall, known in _RECALLS.items():
            weights[recall] = _SKILLS[recall] * (4 if getattr(chat, known) else 0.4)
        weights[facts.capital] = _SKILLS[facts.capital] * (3 if chat.country else 1)
        if chat.tools:
            weights[tools.weather] = 60
        (skill,) = rng.choices(list(weights), weights=list(weights.values()))
        skill(chat)
        if chat.messages[-1].get("tool_calls"):
            tools.weather_result(chat)
        if skill is writing.tell_story:
            weights[skill] = 0
    return chat


def text(rng: random.Random) -> str:
    """A text outside a chat, for completions: a story."""
    name, friend = rng.choice(writing.STORY_NAMES), rng.choice(writing.FRIENDS)
    return writing.story(rng, rng.choice(writing.HEROES), name, friend)


@dataclass(frozen=True, slots=True)
class Question:
    """A graded prompt: the request's messages and tools, and whether an answer is right."""

    skill: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    right: Right


def _recall(tell: Skill, recall: Skill) -> Skill:
    """Told, then up to four turns about other things, then asked."""

    def skill(chat: Chat) -> None:
        tell(chat)
        between = [numbers.add, facts.capital, small_talk.goodbye, writing.joke, facts.unknown, numbers.count]
        for other in chat.rng.sample(between, chat.rng.randint(0, 4)):
            other(chat)
        recall(chat)

    return skill


def _tool_call(chat: Chat) -> None:
    tools.offer(chat)
    tools.weather(chat)


def _tool_result(chat: Chat) -> None:
    _tool_call(chat)
    tools.weather_result(chat)


def _pirate(chat: Chat) -> None:
    _system(chat, PIRATE)
    facts.capital(chat)
    right = chat.right
    chat.right = lambda message: right(message) and "arr" in message["content"].lower()


_EXAMINATION: Final[dict[str, tuple[int, Skill]]] = {
    "greeting": (5, small_talk.greeting),
    "saying goodbye": (5, small_talk.goodbye),
    "saying what it is": (7, small_talk.identity),
    "recalling a name": (7, _recall(memory.tell_name, memory.recall_name)),
    "recalling a colour": (7, _recall(memory.tell_both, memory.recall_colour)),
    "adding": (7, numbers.add),
    "subtracting": (7, numbers.subtract),
    "counting": (7, numbers.count),
    "capitals": (10, facts.capital),
    "jokes": (5, writing.joke),
    "stories": (3, writing.tell_story),
    "JSON": (7, writing.person),
    "calling a tool": (6, _tool_call),
    "using a tool's result": (6, _tool_result),
    "admitting ignorance": (7, facts.unknown),
    "obeying a system message": (4, _pirate),
}


def examination(seed: int = 0, times: int = 1) -> Iterator[Question]:
    """`times` 100 questions, in phrasings and with names, colours and cities that are never trained on."""
    for skill, (count, ask) in _EXAMINATION.items():
        seen: set[str] = set()
        rng = random.Random(f"{seed} {skill}")
        while len(seen) < count * times:
            chat = Chat(rng, held_out=True)
            ask(chat)
            messages = chat.messages[:-1]
            if str(messages) not in seen:
                seen.add(str(messages))
                yield Question(skill, [_as_sent(message) for message in messages], chat.tools, chat.right)


def _as_sent(message: Message) -> Message:
    """With the arguments of its calls as JSON, which is how the API has them."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return message | ({"tool_calls": calls} if calls else {})
