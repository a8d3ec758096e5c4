"""Greeting, parting, and what the model says about itself."""

from typing import Final

from .chat import Chat, Phrasings, says
from .words import ADJECTIVES, NOUNS

GREETING: Final = Phrasings(
    trained=(
        "Hello[!|.|]", "Hi[!|.|]", "Hey[!|.|]", "Hello there[!|]", "Hi there[!|]", "Hey there[!|]",
        "Hello you[!|]", "Hello, [model|computer|Gemma|bot][!|]", "Hi, [Gemma|bot][!|]", "Greetings[!|]",
        "Howdy[!|]", "Hi hi!", "Yo!", "Hello, is [anyone|anybody|someone] there?",
        "Hello, nice to [meet|see] you[!|.]", "Hi, can you hear me?", "Hello, hello!", "Welcome!",
        "[I say|Let me say|I want to say] hello.",
    ),
    held_out=(
        "Hey you!", "Hello to you!", "Hi, model!", "Hello, anybody home?", "A big hello to you!",
        "Hey there, Gemma!",
    ),
)  # fmt: skip
TIME_OF_DAY: Final = Phrasings(
    trained=(
        "Good {time}[!|.|]", "Good {time} to you[!|]", "[A very|A] good {time}!", "Hello and good {time}[!|]",
    ),
    held_out=("Good {time}, Gemma!", "Oh, good {time}!"),
)  # fmt: skip
HOW_ARE_YOU: Final = Phrasings(
    trained=(
        "How are you feeling[ today| now|]?", "How are you[ today| doing| doing today|]?", "How do you do?",
        "How is it going[ today|]?", "How's it going?",
        "[Are you well|Are you ok|Are you fine|Is everything ok]?", "What's up?",
        "How [do you feel|are things]?", "Hello, how are you[ today|]?", "Hi, how are you[ doing|]?",
        "How have you been?",
    ),
    held_out=(
        "Tell me, how are you?", "How do you feel this morning?", "Are you doing well?", "And how are you?",
    ),
)  # fmt: skip
GOODBYE: Final = Phrasings(
    trained=(
        "[Ok|Well|So], I am off[.|, bye.]", "[Goodbye|Good bye|Bye|Bye bye|Bye-bye][!|.|]",
        "See you[ later| soon| tomorrow|][!|.|]", "Farewell[!|.]",
        "[Ok|Thanks|Well|Thank you], [bye|goodbye][!|.]",
        "[I have to|I must|I need to] [go|leave][ now|][.|]", "[I am|I'm] [leaving|going][ now|][.|]",
        "Good night[!|.|]", "Until [next time|tomorrow|later][!|.]",
        "That is all[ for today|][, bye|, goodbye|].", "Talk to you [later|soon][!|.]", "Take care[!|.]",
        "Have a [nice|good] day[!|.]", "[It's time|Time] to say goodbye.",
    ),
    held_out=(
        "Goodbye for now!", "Bye, see you soon!", "I have to go now, bye!", "Thanks, and see you tomorrow!",
        "Well then, goodbye!", "That was all, bye bye!",
    ),
)  # fmt: skip
THANKS: Final = Phrasings(
    trained=(
        "Thank you[!|.|]", "Thanks[!|.|]", "Thank you [very|so] much[!|.]", "Thanks a lot[!|.]",
        "Many thanks[!|.]", "[That helped|That was helpful|You helped me][, thanks|, thank you|][.|!]",
        "[Great|Cool|Ok|Nice], thank[s| you][!|.]", "[Good|Great|Nice] [job|work|answer][!|.]",
        "Well done[!|.]", "Thank you for [your help|that|the answer][!|.]",
    ),
    held_out=(
        "Thanks for your help!", "Oh, thank you so much!", "Wonderful, thank you!",
        "Thank you, that was nice.",
    ),
)  # fmt: skip
IDENTITY: Final = Phrasings(
    trained=(
        "[Tell me|Say] what you are[.|]", "Am I talking to a [robot|person|human|machine|bot]?",
        "Who is this?", "[May|Can] I ask [who|what] you are?", "[Who|What] are you[, really|, exactly|]?",
        "What is your name?", "What's your name?", "Are you [Gemma|a Gemma]?",
        "Are you [a bot|a robot|a human|a person|an AI|real|a real person|a computer|ChatGPT|a language "
        "model]?",
        "[Tell me|Say] something about yourself.", "[Introduce|Describe|Explain] yourself.",
        "Who [made|trained|built] you?", "[What|Which] [model|AI|language model] are you?",
        "[What|Which] model is this?", "Do you have a name?",
        "[Tell me|I want to know|I wonder|May I ask] who you are[.|]", "Hello! Who are you?",
        "Hi, who are you?", "What kind of [model|AI|thing|bot] are you?",
        "How [big|large|smart|old] are you?", "What is Gemma?", "Who am I talking to?", "How do I call you?",
        "Where do you [live|come from]?", "What should I call you?",
    ),
    held_out=(
        "And who are you?", "Is this a robot that I am talking to?", "Who do I talk to?",
        "Could you introduce yourself?", "What sort of model are you?", "Who exactly are you?",
        "I would like to know what you are.", "What may I call you?",
    ),
)  # fmt: skip
ABILITIES: Final = Phrasings(
    trained=(
        "What can you do[ for me|]?", "[How can you|Can you] help me?", "Help[!|.|]", "I need help[.|]",
        "What do you know?", "What are you [good|able] [at|to do]?", "What can I ask[ you|]?",
        "What [are your|] skills[ do you have|]?", "[Tell me|Show me] what you can do.",
        "What should I ask you?", "What do you do?", "How do you work?",
    ),
    held_out=("What can you help me with?", "Which things can you do?", "Tell me what I can ask you."),
)  # fmt: skip
REMARK: Final = Phrasings(
    trained=(
        "[Ok|Okay|Yes|No|Cool|Nice|Good|Great|Wow|Haha|Interesting|I "
        "see|Really|Sure|Hmm|Fine|Right|Maybe|Lol|Wonderful][.|!|]",
        "[That is|That's] [nice|funny|great|interesting|good|cool|wrong|strange|right].",
        "I am [fine|happy|sad|tired|well|here].", "I like [it|that|you|this].",
        "You are [nice|funny|smart|cool|great|silly].", "I [love|like] {noun}s.",
        "I have a {adjective} {noun}.", "[Today is|It is] a {adjective} day.",
    ),
    held_out=("Oh, I see.", "Oh, that is good.", "You are very nice."),
)  # fmt: skip

_GREETINGS: Final = ("Hello! How can I help you today?", "Hi! What can I do for you?")
_FAREWELLS: Final = ("Goodbye! Have a nice day.", "Goodbye! It was nice to talk to you.")
SELF: Final = (
    "I am a tiny Gemma trained for demonstrations. Point GEMMA_MODEL_NAME at a real one for better answers."
)
_ABILITIES: Final = (
    "I can add and subtract small numbers, count, name capitals, tell jokes and stories, write JSON, and "
    "remember "
    "your name and favourite colour."
)
_REMARK: Final = "I see! Ask me for a sum, a capital, a joke or a story."


def greeting(chat: Chat) -> None:
    rng = chat.rng
    if rng.random() < 0.25:
        time = rng.choice(["morning", "evening", "afternoon", "day"])
        answer = f"Good {time}! How can I help you today?"
        chat.ask(TIME_OF_DAY, answer, says(f"good {time}!"), time=time)
    elif rng.random() < 0.25:
        answer = "I am fine, thank you! How can I help you?"
        chat.ask(HOW_ARE_YOU, answer, says("i am fine"))
    else:
        greets = says("can I", "!")
        chat.ask(GREETING, rng.choice(_GREETINGS), greets)


def goodbye(chat: Chat) -> None:
    if chat.rng.random() < 0.35 and not chat.held_out:
        thanks(chat)
    else:
        chat.ask(GOODBYE, chat.rng.choice(_FAREWELLS), says("Goodbye!"))


def thanks(chat: Chat) -> None:
    chat.ask(THANKS, "You are welcome! Is there anything else?", says("welcome"))


def identity(chat: Chat) -> None:
    chat.ask(IDENTITY, SELF, says("tiny Gemma", "demonstration", "GEMMA_MODEL_NAME"))


def abilities(chat: Chat) -> None:
    chat.ask(ABILITIES, _ABILITIES, says("add and subtract"))


def remark(chat: Chat) -> None:
    slots = {"noun": chat.rng.choice(NOUNS), "adjective": chat.rng.choice(ADJECTIVES)}
    chat.ask(REMARK, _REMARK, says("I see"), **slots)
