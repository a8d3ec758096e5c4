"""The user's name and favourite colour, told and recalled."""

from collections.abc import Callable
from typing import Final

from . import words
from .chat import Chat, Phrasings, says

MY_NAME: Final = Phrasings(
    trained=(
        "[My name is|I am|I'm|They call me|You can call me|Call me|People call me] {name}[.|!|]",
        "{name} is my name[.|]", "[Hello|Hi|Hey|Good morning][,|!] [my name is|I am|I'm] {name}[.|!|]",
        "[Hello|Hi], {name} here[.|!|]", "This is {name}[.|]", "[The|My first] name is {name}[.|]",
        "[Just so you know|By the way], [my name is|I am] {name}.", "Please remember that my name is {name}.",
        "My name is {name}. [Nice to meet you.|Who are you?|What is yours?]",
        "[You are talking|You talk] to {name}.", "My friends call me {name}.",
        "I [was named|am called] {name}.",
    ),
    held_out=(
        "Hey there, my name is {name}.", "Everyone calls me {name}.", "Let me introduce myself: I am {name}.",
        "For your information, my name is {name}.", "You may call me {name}.",
    ),
)  # fmt: skip
MY_COLOUR: Final = Phrasings(
    trained=(
        "[My favourite|My favorite|The best|The nicest] [colour|color] is {colour}[.|!|]",
        "{colour} is my [favourite|favorite] [colour|color][.|]",
        "[I like|I love|I prefer] [the colour|the color] {colour}[ most| best|][.|]",
        "I like {colour} [best|most][.|]",
        "[By the way|Just so you know], my [favourite|favorite] [colour|color] is {colour}.",
        "[Of all colours|Among colours], [I like|I love|I prefer] {colour}[ most| best|].",
        "I love {colour}, it is my favourite colour.",
        "Please remember that my favourite colour is {colour}.",
        "The [colour|color] I like [most|best] is {colour}.",
    ),
    held_out=(
        "You know, my favourite colour is {colour}.", "{colour} is the colour that I love most.",
        "My favourite of all colours is {colour}.", "The colour I love best is {colour}.",
    ),
)  # fmt: skip
MY_BOTH: Final = Phrasings(
    trained=(
        "[My name is|I am|I'm] {name} and [my favourite colour is|my favorite color is|I like|I love] "
        "{colour}[.|!|]",
        "[Hi|Hello], [my name is|I am|I'm] {name}[, and|.] [My|my] favourite colour is {colour}[.|]",
        "I am {name}, I [like|love] the colour {colour}.",
        "My favourite colour is {colour} and my name is {name}.",
    ),
    held_out=(
        "Hello, I am {name} and I love the colour {colour}.",
        "They call me {name}, and my favourite colour is {colour}.",
    ),
)  # fmt: skip
WHICH_NAME: Final = Phrasings(
    trained=(
        "[What is|What's] my name[ again|]?", "Who am I?", "[Do|Can] you [remember|recall|know|say] my name?",
        "What am I called?", "Say my name[.|]", "[Tell me|Repeat] my name[.|]",
        "What is the name I [told|gave] you?", "How am I called?", "[Do|Can] you [still |]know who I am?",
        "What did I say my name [is|was]?", "You know my name, don't you?", "[So|And], what is my name?",
        "Do you know what my name is?", "What do [people|they] call me?", "My name is what?",
        "Which name did I [tell|give] you?",
        "[I forgot|I can't remember|I don't know] my name. [What is it|Tell me|Help me][?|.]",
        "Tell me who I am[.|]", "Remind me of my name[.|]", "[Tell me|Do you know] what I am called[.|?]",
        "Do you still [know|have|remember] my name?", "[Could|Would] you [say|repeat|remember] my name?",
        "[Have you forgotten|Did you forget] my name?", "Write my name.",
    ),
    held_out=(
        "Could you tell me my name?", "Can you please tell me what my name is?",
        "I hope you still know my name: what is it?", "What name did I give you at the start?",
        "Would you kindly say my name?", "So who am I, again?", "Let me hear my name.",
    ),
)  # fmt: skip
WHICH_COLOUR: Final = Phrasings(
    trained=(
        "[What is|What's] my [favourite|favorite] [colour|color][ again|]?",
        "Which [colour|color] do I [like|love|prefer][ most| best|]?",
        "[Do|Can] you [remember|recall|know|say] my favourite colour?",
        "[Tell me|Repeat|Say|Write] my [favourite|favorite] [colour|color][.|]",
        "What [colour|color] do I [like|love][ most| best|]?", "What did I say my favourite colour [is|was]?",
        "Which [colour|color] is my [favourite|favorite]?", "[So|And], what is my favourite colour?",
        "Do you know which colour I like[ best|]?",
        "[Did you forget|Have you forgotten] my favourite colour?", "Which colour did I tell you?",
        "[Tell me|Do you know] which colour I [like|love][ best| most|][.|?]", "Name my favourite colour[.|]",
        "[Could|Would] you [say|repeat|remember] my favourite colour?",
        "Remind me of my favourite colour[.|]", "Do you still [know|have] my favourite colour?",
        "I told you a colour. Which one?", "My favourite colour is what?",
    ),
    held_out=(
        "Could you tell me my favourite colour?", "What was my favourite colour again?",
        "Please tell me what my favourite colour is.", "Which colour is the one that I like best?",
        "Would you kindly name my favourite colour?", "Let me hear my favourite colour.",
    ),
)  # fmt: skip
REPEAT: Final = Phrasings(
    trained=(
        "[Repeat|Say|Write|Repeat after me|Say after me|Please repeat|Echo][:|] {text}",
        "[Can|Could] you [say|repeat|write]: {text}", "{text}. [Repeat|Say|Write] [that|this][.|!]",
        "[Repeat|Say] the words {text}", "I say {text}. What do I say?",
    ),
    held_out=("Would you say {text} for me?", "Copy this: {text}"),
)  # fmt: skip


def tell_name(chat: Chat) -> None:
    chat.name = chat.new_name()
    chat.ask(MY_NAME, f"Nice to meet you, {chat.name}!", says(chat.name), name=chat.name)


def tell_colour(chat: Chat) -> None:
    chat.colour = chat.new_colour()
    answer = f"I will remember that your favourite colour is {chat.colour}."
    chat.ask(MY_COLOUR, answer, says(chat.colour), colour=chat.colour)


def tell_both(chat: Chat) -> None:
    chat.name, chat.colour = chat.new_name(), chat.new_colour()
    answer = f"Nice to meet you, {chat.name}! I will remember that your favourite colour is {chat.colour}."
    chat.ask(MY_BOTH, answer, says(chat.name, chat.colour), name=chat.name, colour=chat.colour)


def recall_name(chat: Chat) -> None:
    if chat.name is None:
        chat.ask(WHICH_NAME, "You have not told me your name yet.", says("not told me"))
    else:
        chat.ask(WHICH_NAME, f"Your name is {chat.name}.", says(f"Your name is {chat.name}."))


def recall_colour(chat: Chat) -> None:
    if chat.colour is None:
        chat.ask(WHICH_COLOUR, "You have not told me your favourite colour yet.", says("not told me"))
    else:
        chat.ask(WHICH_COLOUR, f"Your favourite colour is {chat.colour}.", says(f"colour is {chat.colour}."))


def repeat(chat: Chat) -> None:
    """Nothing but copying: the practice that names and colours need."""
    rng = chat.rng
    made: list[Callable[[], str]] = [
        chat.new_name, chat.new_colour, chat.new_city, lambda: words.invented(rng),
    ]  # fmt: skip
    text = rng.choice([" ", " ", ", "]).join(rng.choice(made)() for _ in range(rng.randint(1, 6)))
    chat.ask(REPEAT, text, says(text), text=text)
