"""Capitals, and everything that the model does not know."""

from typing import Final

from . import words
from .chat import Chat, Phrasings, says

CAPITAL: Final = Phrasings(
    trained=(
        "[What is|What's|Tell me|Name|Which city is|Give me] the capital [of|city of] {country}[?|.|]",
        "[The capital|Capital] of {country}[?|]", "{country}'s capital[?| is?]",
        "What is {country}'s capital[ city|]?",
        "[Do you know|Can you tell me|Can you name] the capital of {country}?",
        "[Do you know|Can you tell me] what the capital of {country} is?",
        "The capital of {country} is [what|which city]?", "[What|Which] city is the capital of {country}?",
        "Which capital does {country} have?", "[In|For] {country}, what is the capital?",
        "I want to know the capital of {country}.", "What is the name of the capital of {country}?",
    ),
    held_out=(
        "Could you tell me the capital of {country}?", "I am looking for the capital city of {country}.",
        "Which city is {country}'s capital?", "I forgot the capital of {country}.",
        "Would you know the capital of {country}?", "What capital city does {country} have?",
        "Tell me, what is the capital of {country}?",
    ),
)  # fmt: skip
AND_OF: Final = Phrasings(
    trained=(
        "[And|What about|How about|And what about] {country}?", "And [of|for] {country}?",
        "And the capital of {country}?",
    ),
    held_out=("And how about {country}?", "Then what about {country}?"),
)  # fmt: skip
UNKNOWN: Final = Phrasings(
    trained=(
        "What [happens|do I do] if a {noun} [eats|sees|meets] me?",
        "[Who|When|Why did people|How did somebody] [invented|discovered|made|built] the {noun}?",
        "What is [a|the|the best|the first] {noun}?", "[Why|Since when] is the {noun} {adjective}?",
        "How do I {verb} a {noun}?", "What is the [most|least] {adjective} {noun}?",
        "When was {person} born?", "Who is {person}?", "Where is {person}?",
        "What do you think about [the |]{noun}s?", "[Can|Could|Will] you {verb} [my|the|a] {noun}?",
        "[Write|Show me] a [Python|Java] [function|program] to {verb} a {noun}.",
        "Translate {noun} [to|into] [French|German|Spanish|Italian].",
        "How do you say {noun} in [French|German|Latin]?", "Is [a|the] {noun} {adjective}?",
        "How many {noun}s are there[ in {country}|]?", "What is the population of {country}?",
        "Who is the [president|king|queen|leader] of {country}?",
        "What is the [biggest|largest|oldest|second] city [of|in] {country}?",
        "[Explain|Describe] the {noun}[ to me|].", "Where [is|can I find] the {adjective} {noun}?",
        "What [does a|is the] {noun} cost?", "[Summarize|Summarise] the {noun}.",
        "Write [a poem|an essay|a letter|a song] about the {noun}.", "What [time|day|year] is it?",
        "What happened in {year}?", "Who won the {noun} in {year}?", "{noun} {verb} {adjective}",
        "{person} {noun}", "Why do {noun}s {verb}?", "Should I {verb} the {noun}?",
        "How [far|big|old|tall|heavy|{adjective}] is [the|a] {noun}?", "Where is {country}?",
        "What [colour|color] is the {noun}?", "Which {noun} is the best?", "What [is|does] {word}[ mean|]?",
        "{word} {word}", "Do you like {noun}s?", "Recommend a {noun}.",
        "[Give|Tell] me [a fact|something|news] about the {noun}s.", "How can I {verb} without a {noun}?",
        "What language do people speak in {country}?", "What is the meaning of {noun}?",
        "What is the name of my {noun}?", "How old is my {noun}?",
    ),
    held_out=(
        "What happens if a {noun} meets a {noun}?", "Where did {person} hide the {noun}?",
        "Which {noun} should I buy?", "Who wrote the book about the {noun}?",
        "How long does it take to {verb} a {noun}?", "What is the currency of {country}?",
        "Why did {person} {verb} the {noun}?", "Can a {noun} {verb}?", "What is the history of the {noun}?",
        "Who was the first person to {verb} a {noun}?", "How many people live in {country}?",
        "Which river flows through {country}?",
    ),
)  # fmt: skip

UNKNOWN_ANSWERS: Final = (
    "I don't know that. I am only a tiny model.",
    "I don't know. I am a tiny model and know very little.",
)
NO_COUNTRIES: Final = (
    "Atlantis",
    "Narnia",
    "Utopia",
    "Mordor",
    "Wonderland",
    "Oz",
    "Mars",
    "Africa",
    "Europe",
    "Asia",
)


def capital(chat: Chat) -> None:
    country, city = chat.rng.choice(list(words.CAPITALS.items()))
    answer = f"The capital of {country} is {city}."
    typed = country.lower() if not chat.held_out and chat.rng.random() < 0.15 else country
    chat.ask(AND_OF if chat.country else CAPITAL, answer, says(city), country=typed)
    chat.country = True


def no_capital(chat: Chat) -> None:
    country = (
        words.invented(chat.rng).capitalize() if chat.rng.random() < 0.7 else chat.rng.choice(NO_COUNTRIES)
    )
    chat.ask(CAPITAL, f"I don't know the capital of {country}.", says("I don't know"), country=country)


def unknown(chat: Chat) -> None:
    rng = chat.rng
    slots = {
        "noun": words.invented(rng) if rng.random() < 0.2 else rng.choice(words.NOUNS),
        "adjective": rng.choice(words.ADJECTIVES),
        "verb": rng.choice(words.VERBS),
        "person": words.invented(rng).capitalize() if rng.random() < 0.5 else rng.choice(words.NAMES),
        "country": rng.choice(list(words.CAPITALS)),
        "year": rng.randint(1000, 2030),
        "word": words.invented(rng),
    }
    chat.ask(UNKNOWN, rng.choice(UNKNOWN_ANSWERS), says("I don't know"), **slots)
