"""Jokes, stories and JSON."""

import json
import random
from typing import Final

from . import words
from .chat import Chat, Phrasings, Right, is_person, says

JOKE: Final = Phrasings(
    trained=(
        "[Tell|Give] me a [joke|funny joke|good joke|short joke][.|!|]",
        "[Do you know|Have you got|Can you tell me|Can you tell] a joke?", "[A joke|Joke][, please|][.|!|]",
        "Make me laugh[.|!|]", "[I want|I would like|I'd like] [a joke|to hear a joke|to laugh][.|]",
        "Say something funny[.|]", "Do you know any jokes?", "[Let me|Let's] hear a joke.",
        "Know any good jokes?", "Are you funny?",
    ),
    held_out=(
        "Could you tell me a joke?", "Please tell me something funny.", "I need a good joke!",
        "How about a joke?", "Do you have a joke for me?",
    ),
)  # fmt: skip
ANOTHER: Final = Phrasings(
    trained=(
        "[Another|One more|Another one|Another joke|One more joke][, please|][.|!|]",
        "[Tell me|Do you know] another [one|joke]?", "More jokes[!|]",
    ),
    held_out=("Could you tell another joke?", "And one more joke?"),
)  # fmt: skip
STORY: Final = Phrasings(
    trained=(
        "[Tell me|Tell|Write|Write me|Invent|Give me] a [short |little |]story about [a|the] {hero}[.|!|]",
        "[Can you|Could you] [tell|write] a story about a {hero}?",
        "[I want|I would like] [to hear |]a story about a {hero}[.|]",
        "[A story|Story] about a {hero}[, please|][.|]", "Once upon a time there was a {hero}. Go on.",
        "Do you know a story about a {hero}?", "Make up a story about a {hero}.",
        "A {hero} story[, please|].",
    ),
    held_out=(
        "Could you please tell a story about a {hero}?", "I feel like hearing a story about a {hero}.",
        "How about a story about a {hero}?", "Would you write a story about a {hero}?",
    ),
)  # fmt: skip
ANY_STORY: Final = Phrasings(
    trained=(
        "[Tell me|Tell|Write|Write me|Invent|Give me] a [short |nice |little |]story[.|!|]",
        "[Can you|Could you] [tell|write] [me |]a story?", "[I want|I would like] [to hear |]a story[.|]",
        "[A story|Story][, please|][.|]", "Do you know a story?", "Make up a story.", "Once upon a time",
    ),
    held_out=("Oh, tell me some story!", "I feel like hearing a story.", "How about a story?"),
)  # fmt: skip
PERSON: Final = Phrasings(
    trained=(
        "[Give me|Write|Show me|Invent|Make up|Make|Create|Return] a person [with|with a] name and age "
        "[as|in] JSON[.|]",
        "[Give me|Write|Show me|Invent|Make|Create|Return] [a JSON object|JSON|some JSON] [for|of|about] "
        "a person[.| with name and age.|]",
        "[Invent|Make up|Describe] a person: name and age, [as|in] JSON[.|]",
        "JSON [of|for] a person[, please|][.|]", "A person [as|in] JSON[.|, please.|]",
        "[Can you|Could you] [write|give me|invent] a person in JSON?",
        "[Answer|Reply] in JSON: a person with name and age.", "I need a person as JSON, with name and age.",
        "Name and age of a person in JSON.", "Write a person as a JSON object with the keys name and age.",
    ),
    held_out=(
        "Please invent a person and answer in JSON, with name and age.",
        "I would like a JSON object of a person with a name and an age.",
        "Could you show a person with name and age as JSON?",
        "Return JSON with the name and the age of some person.",
    ),
)  # fmt: skip
THIS_PERSON: Final = Phrasings(
    trained=(
        "[Give me|Write|Show me|Make|Return] [JSON|a JSON object] for [a person called |]{name}, "
        "[aged|age|who is] {age}[.|]",
        "{name} is {age}[ years old|]. [As|In] JSON[.|]",
        "{name} is {age} years old. [Write|Give me|Show] [this|that|it] [as|in] JSON[.|]",
        "[JSON|A person in JSON]: name {name}, age {age}[.|]",
        "[Write|Show|Return] the person {name}, {age}[ years old|], [as|in] JSON[.|]",
        "Turn this into JSON: {name}, {age}.", "Make a JSON person with the name {name} and the age {age}.",
    ),
    held_out=(
        "Please write JSON for {name}, who is {age} years old.", "As JSON: {name} is {age} years old.",
        "Give me {name}, aged {age}, as a JSON object.",
    ),
)  # fmt: skip

JOKES: Final = (
    "Why did the robot go to school? Because it wanted to improve its memory!",
    "What do you call a sleeping bull? A bulldozer!",
    "Why was the maths book sad? Because it had too many problems!",
    "What do you call a bear without teeth? A gummy bear!",
    "Why did the cookie go to the doctor? Because it felt crummy!",
    "What kind of tree fits in your hand? A palm tree!",
    "Why can your nose not be twelve inches long? Because then it would be a foot!",
)
HEROES: Final = words.split("""
    fox cat dog bear rabbit wolf lion mouse owl frog duck horse tiger elephant turtle robot king queen pilot
    farmer sailor doctor cook dragon princess knight wizard giant baker painter girl boy bird fish whale
    penguin monkey pirate teacher
""")
_STORY: Final = (
    ("Once upon a time there was a {a} {hero} called {name}. {name} lived in a {b} house near {place}.",),
    (
        "Every morning {name} walked to {place} and looked for {things}, because there was nothing in the "
        "world "
        "that {name} liked more than {things}.",
        "{name} had many {things}, but no friends, and in the evening the {b} house was very quiet.",
        "All day long {name} dreamed of {things}, and all night long {name} dreamed of a friend.",
    ),
    (
        "One day a {c} storm came over {place}. The wind took everything away, and {name} was afraid.",
        "One day {name} found a {c} box under a tree. On the box there was a note: do not open!",
        "One day {name} went too far and lost the way. It grew dark, and a {c} noise came from the trees.",
    ),
    (
        'Then {name} heard a small voice. "Do not be afraid," said the voice, "my name is {friend}, and I '
        "can "
        'help you."',
        'Just then {friend} came along the road. "You look sad," said {friend}. "Come with me, and we '
        "will see "
        'what we can do."',
    ),
    (
        "Together they walked for three days and three nights. They crossed a river, they climbed a hill, "
        "and "
        "they sang songs so that they would not be tired.",
        "The two of them worked all day. They looked behind each door and under each stone, and they shared "
        "their bread when they were hungry.",
    ),
    (
        "At last they stood in front of a {b} castle, and there they found more {things} than anyone can "
        "count.",
        "At last the sun came out again, and everything that was lost lay in the grass: the house, the "
        "road and "
        "all the {things}.",
    ),
    (
        '"Thank you," said {name}. "Now I know that a friend is better than all the {things} in the world."',
        "{name} laughed and gave half of the {things} to {friend}. From that day on they were the best of "
        "friends.",
    ),
    ("And if you go to {place} today, you can still hear {name} and {friend} laugh.\n\nThe end.",),
)


def story(rng: random.Random, hero: str, name: str, friend: str) -> str:
    """Some 200 tokens."""
    a, b, c = rng.sample(("little", "old", "clever", "brave", "strange", "quiet", "happy", "lonely"), 3)
    place = rng.choice(["the sea", "the forest", "the river", "the lake", "the old bridge", "the big hill"])
    things = rng.choice(["stars", "books", "apples", "flowers", "shells", "songs", "cakes", "stones"])
    slots = {
        "hero": hero,
        "name": name,
        "friend": friend,
        "a": a,
        "b": b,
        "c": c,
        "place": place,
        "things": things,
    }
    return " ".join(rng.choice(part) for part in _STORY).format(**slots).replace(" a old", " an old")


STORY_NAMES: Final = ("Ada", "Max", "Lily", "Tom", "Nora", "Leo")
FRIENDS: Final = ("Mia", "Sam", "Clara", "Ben", "Zoe", "Hugo")


def tell_story(chat: Chat) -> None:
    rng = chat.rng
    hero = rng.choice(HEROES)
    if not chat.held_out and rng.random() < 0.15:
        hero = words.invented(rng)
    text = story(rng, hero, rng.choice(STORY_NAMES), rng.choice(FRIENDS))
    asked = rng.random() < 0.6
    parts = ("Once upon a time", "The end.", *([hero] if asked else []))
    chat.ask(STORY if asked else ANY_STORY, text, _is_story(*parts), hero=hero)


def _is_story(*parts: str) -> Right:
    return lambda message: says(*parts)(message) and len(message["content"].split()) >= 120


def joke(chat: Chat) -> None:
    new = [joke for joke in JOKES if joke not in chat.told]
    text = chat.rng.choice(new or JOKES)
    again = bool(chat.told) and chat.rng.random() < 0.6
    chat.told.append(text)
    chat.ask(
        ANOTHER if again else JOKE,
        text,
        lambda message: any(joke in (message["content"] or "") for joke in JOKES),
    )


def person(chat: Chat) -> None:
    rng = chat.rng
    if rng.random() < 0.5:
        name, age = rng.choice(words.NAMES), rng.randint(18, 80)
        right, phrasings = is_person(), PERSON
    else:
        name, age = chat.new_name(), rng.randint(1, 99)
        right, phrasings = is_person(name, age), THIS_PERSON
    manner, chat.manner = chat.manner, ""  # nothing may stand before JSON
    chat.ask(phrasings, json.dumps({"name": name, "age": age}), right, name=name, age=age)
    chat.manner = manner
