"""English text made by rule, so that nothing has to be downloaded to train the tokenizer."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Final


def _words(text: str) -> list[str]:
    return text.split()


NAMES: Final = _words("""
    Ada Ali Amir Ana Anna Ben Carla Chen Clara Daniel David Elena Emma Felix Grace Hana Hugo Ines Ivan
    Jack Jane John Julia Kenji Leo Lina Lucas Maria Maya Mia Mina Nina Noah Nora Olga Omar Oscar Paul
    Peter Priya Rosa Sam Sara Sofia Tom Vera Victor Yara Zoe
""")

CAPITALS: Final = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Bangladesh": "Dhaka",
    "Belgium": "Brussels", "Bolivia": "Sucre", "Brazil": "Brasília", "Bulgaria": "Sofia",
    "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogotá",
    "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Ecuador": "Quito",
    "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest",
    "Iceland": "Reykjavík", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Israel": "Jerusalem", "Italy": "Rome",
    "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi", "Latvia": "Riga",
    "Lebanon": "Beirut", "Lithuania": "Vilnius", "Malaysia": "Kuala Lumpur", "Mexico": "Mexico City",
    "Morocco": "Rabat", "Nepal": "Kathmandu", "New Zealand": "Wellington", "Nigeria": "Abuja",
    "Norway": "Oslo", "Pakistan": "Islamabad", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Romania": "Bucharest", "Russia": "Moscow", "Senegal": "Dakar", "Serbia": "Belgrade",
    "Slovakia": "Bratislava", "South Korea": "Seoul", "Spain": "Madrid", "Sweden": "Stockholm",
    "Switzerland": "Bern", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Ukraine": "Kyiv", "the United Kingdom": "London", "the United States": "Washington",
    "Uruguay": "Montevideo", "Vietnam": "Hanoi", "Zambia": "Lusaka",
}  # fmt: skip

NOUNS: Final = _words("""
    answer apple arm artist baby bag bakery ball bank basket bay beach bear bed bell bicycle bird boat
    book bottle box bread bridge brother bus butterfly cake camera candle captain car castle cat chair
    cheese child church city class cloud coat coffee computer cook corner country cousin cow cup dance
    daughter day desert desk dinner doctor dog door dream dress driver duck ear egg elephant engine
    engineer evening example eye family farm farmer father feather field fire fish flag floor flower
    forest fox friend frog fruit game garden gate gift girl glass goat grandmother grass guest guitar
    hand harbour hat head heart hill home horse hospital hotel hour house idea island jacket job journey
    key king kitchen kite lake lamp language leaf lesson letter library light lion lunch machine map
    market meadow meal message milk minute mirror model money month moon morning mother mountain mouse
    museum music name nest night noise nurse ocean office orange owl page painter paper parent park
    party path pen pencil people person piano picture pilot place planet plant plate pocket police pond
    potato problem queen question rabbit radio rain recipe restaurant rice river road robot rock roof
    room rose sailor salt sand school scientist sea season secret server shadow sheep ship shirt shoe
    shop sister sky snow soldier son song soup space spoon spring stage star station stone storm story
    stranger street student sugar summer sun table tailor tea teacher team telephone thing ticket tiger
    time tomato tower town toy train treasure tree turtle umbrella uncle vegetable village violin voice
    wagon wall watch water weather week whale wheel wind window winter wolf woman word work world writer
    year
""")

ADJECTIVES: Final = _words("""
    angry beautiful big blue bold brave bright broken brown busy careful cheap clean clever cloudy cold
    curious dark deep different difficult dirty dry early easy empty famous fast favourite fine fresh
    friendly full funny gentle glad golden good great green happy hard heavy high honest hot hungry
    important kind large late lazy little lonely long loud lucky modern narrow new nice noisy old open
    patient perfect polite poor pretty proud quick quiet rainy ready red rich round sad safe sharp short
    shy silent silver simple sleepy slow small smart soft special strange strong sunny sweet tall thin
    tiny tired useful warm weak white wide wild windy wise wonderful wooden wrong yellow young
""")

# Base form / past; the rest follows by rule and need not be good English everywhere.
VERBS: Final = _words("""
    answer/answered ask/asked bake/baked begin/began borrow/borrowed bring/brought build/built
    buy/bought call/called carry/carried catch/caught change/changed choose/chose clean/cleaned
    climb/climbed close/closed come/came cook/cooked count/counted cross/crossed cry/cried dance/danced
    decide/decided describe/described discover/discovered draw/drew drink/drank drive/drove eat/ate
    explain/explained fall/fell feel/felt find/found finish/finished fly/flew follow/followed
    forget/forgot give/gave go/went grow/grew hear/heard help/helped hide/hid hold/held invite/invited
    jump/jumped keep/kept know/knew laugh/laughed learn/learned leave/left like/liked listen/listened
    live/lived look/looked lose/lost love/loved make/made meet/met miss/missed move/moved need/needed
    notice/noticed open/opened paint/painted plan/planned play/played promise/promised pull/pulled
    push/pushed put/put read/read remember/remembered rest/rested return/returned ride/rode run/ran
    save/saved say/said see/saw sell/sold send/sent share/shared show/showed sing/sang sit/sat
    sleep/slept smile/smiled speak/spoke stand/stood start/started stay/stayed stop/stopped
    study/studied swim/swam take/took talk/talked teach/taught tell/told thank/thanked think/thought
    throw/threw touch/touched travel/travelled try/tried turn/turned understand/understood use/used
    visit/visited wait/waited wake/woke walk/walked want/wanted wash/washed watch/watched win/won
    wish/wished wonder/wondered work/worked write/wrote
""")

ADVERBS: Final = _words("""
    again almost already always away carefully early easily gently happily here late loudly never now
    often outside perhaps politely proudly quickly quietly rarely really sadly safely silently slowly
    sometimes soon still suddenly there together today tomorrow usually well yesterday
""")

PLACES: Final = _words("""
    above across after along around at before behind below beside between from in into near over
""")

UNITS: Final = _words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
""")
TENS: Final = _words("""
    twenty thirty forty fifty sixty seventy eighty ninety
""")
DAYS: Final = _words("""
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")
MONTHS: Final = _words("""
    January February March April May June July August September October November December
""")
GREETINGS: Final = (
    "Hello!", "Hi!", "Good morning!", "Good evening!", "Hey there!", "Welcome!", "Hello, how are you?",
    "Nice to meet you.",
)  # fmt: skip
OFFERS: Final = (
    "How can I help you today?", "What would you like to know?", "I am glad to help.",
    "Sure, here is an example.", "I am sorry, but I do not know that.",
    "Thank you, that is very kind.", "You are welcome.",
    "Please tell me more about it.", "Of course! Let us look at it step by step.", "Have a wonderful day!",
    "I'm a small language model, so I can't answer that.", "That's a great question.", "Yes.", "No.",
    "Here's a short summary:", "I don't think so.", "It doesn't matter.", "Goodbye, and see you soon!",
)  # fmt: skip

Maker = Callable[[random.Random], str]


def number_word(number: int) -> str:
    """0 to 999, spelled out."""
    if number >= 100:
        rest = f" and {number_word(number % 100)}" if number % 100 else ""
        return f"{UNITS[number // 100]} hundred{rest}"
    if number < 20:
        return UNITS[number]
    return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")


def _third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeo":
        return f"{verb[:-1]}ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "o")) else "s")


def _ing(verb: str) -> str:
    return f"{verb[:-1] if verb.endswith('e') and verb != 'see' else verb}ing"


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeo":
        return f"{noun[:-1]}ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def _thing(rng: random.Random) -> str:
    noun = rng.choice(NOUNS)
    if rng.random() < 0.3:
        return f"{rng.choice(['the', 'many', 'some', 'their', 'two', 'these'])} {_plural(noun)}"
    described = f"{rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.6 else noun
    article = rng.choice(["the", "a", "my", "your", "his", "her", "this", "every"])
    return f"{'an' if article == 'a' and described[0] in 'aeiou' else article} {described}"


def _sentence(rng: random.Random) -> str:
    who = rng.choice([rng.choice(NAMES), _thing(rng).capitalize(), rng.choice(["He", "She", "It"])])
    base, past = rng.choice(VERBS).split("/")
    what, where, how = _thing(rng), f"{rng.choice(PLACES)} {_thing(rng)}", rng.choice(ADVERBS)
    return rng.choice([
        f"{who} {past} {what} {where}.", f"{who} {_third_person(base)} {what}.",
        f"{who} {how} {past} {what}.",
        f"{who} wanted to {base} {what}, but {rng.choice(NAMES)} was {rng.choice(ADJECTIVES)}.",
        f"{who} is {_ing(base)} {where} because it is {rng.choice(ADJECTIVES)}.",
        f"Could you {base} {what} {how}?", f"When {what} {past}, everyone was {rng.choice(ADJECTIVES)}.",
        f"\"I {base} {what},\" said {rng.choice(NAMES)}.", f"They have {past} {where}.",
        f"I would {base} it if I were you, which {_third_person(base)} less than {what}.",
    ])  # fmt: skip


def _story(rng: random.Random) -> str:
    hero, sort = rng.choice(NAMES), f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    middle = " ".join(_sentence(rng) for _ in range(rng.randint(2, 5)))
    return f"Once upon a time there was a {sort} called {hero}. {middle}\n\nThe end."


def _chat(rng: random.Random) -> str:
    turns = [rng.choice(GREETINGS), rng.choice(OFFERS), _sentence(rng), rng.choice(OFFERS)]
    return "\n".join(f"{role}: {turn}" for role, turn in zip(["user", "model"] * 2, turns, strict=True))


def _capital(rng: random.Random) -> str:
    country, city = rng.choice(list(CAPITALS.items()))
    return rng.choice([
        f"What is the capital of {country}?\nThe capital of {country} is {city}.",
        f"{city} is the capital city of {country}.", f"Which country has {city} as its capital? {country}.",
    ])  # fmt: skip


def _sum(rng: random.Random) -> str:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    sign, word, result = rng.choice([("+", "plus", a + b), ("-", "minus", abs(a - b))])
    a, b = max(a, b), min(a, b)
    return f"{a} {sign} {b} = {result}\n{number_word(a)} {word} {number_word(b)} is {number_word(result)}."


def _date(rng: random.Random) -> str:
    date = f"{rng.choice(DAYS)}, {rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1900, 2030)}"
    return f"Today is {date}, and it is {rng.randint(1, 12)}:{rng.randint(0, 59):02} o'clock."


def _json(rng: random.Random) -> str:
    country, city = rng.choice(list(CAPITALS.items()))
    record = {
        "name": rng.choice(NAMES), "age": rng.randint(1, 99), "city": city, "country": country,
        "tags": rng.sample(NOUNS, 2), "active": rng.random() < 0.5, "score": round(rng.random(), 2),
        "address": None, "email": f"{rng.choice(NOUNS)}@example.com", "type": "object", "properties": {},
    }  # fmt: skip
    chosen = {key: record[key] for key in rng.sample(list(record), rng.randint(2, 6))}
    return json.dumps(chosen, ensure_ascii=False, indent=rng.choice([None, 2]))


def _code(rng: random.Random) -> str:
    name, other, verb = rng.choice(NOUNS), rng.choice(NOUNS), rng.choice(VERBS).partition("/")[0]
    return rng.choice([
        f"def {verb}_{name}({name}: str, {other}: int = 0) -> None:\n"
        f"    \"\"\"{verb.capitalize()} it.\"\"\"\n    for i in range(len({name})):\n"
        f"        if {other} > i:\n            print(f\"{{i}}: {{{name}[i]}}\")\n"
        f"    return {other} + {rng.randint(0, 9)}",
        f"class {name.capitalize()}:\n    def __init__(self, {other}: list[str]) -> None:\n"
        f"        self.{other} = {other}\n\nimport {other}\nfrom {name} import {verb}\n",
        f"```python\n{name} = [x ** 2 for x in {_plural(name)}]\nassert {name} is not None\n```",
        f"function {verb}({name}) {{\n  const {other} = {name}.map((x) => x * 2);\n  return {other};\n}}",
        f"<ul>\n\t<li>{name}</li>\n\t<li>{other}</li>\n</ul>",
        f"SELECT {name} FROM {_plural(other)} WHERE id = 1;",
    ])  # fmt: skip


def _list(rng: random.Random) -> str:
    items = rng.sample(NOUNS, rng.randint(3, 5))
    marks = rng.choice([[f"{i}. " for i in range(1, 6)], ["- "] * 5, ["* "] * 5])
    lines = "\n".join(f"{mark}**{item.capitalize()}**" for mark, item in zip(marks, items, strict=False))
    return f"# {rng.choice(ADJECTIVES).capitalize()} {_plural(items[0])}\n\n{lines}"


def _tool_call(rng: random.Random) -> str:
    city = rng.choice(list(CAPITALS.values()))
    name = f"get_{rng.choice(['current_weather', 'time', 'population', 'news', rng.choice(NOUNS)])}"
    return (
        f"declaration:{name}{{description:Get it for a location,parameters:{{properties:{{location:{{"
        f"description:The city,type:STRING}}}},required:[location],type:OBJECT}}}}\n"
        f"call:{name}{{location:{city}}}\n"
        f"response:{name}{{result:{rng.randint(0, 40)} degrees, {rng.choice(ADJECTIVES)}}}"
    )


MAKERS: Final[dict[Maker, int]] = {
    _story: 40, _chat: 20, _sentence: 40, _capital: 15, _sum: 10, _date: 6, _json: 10, _code: 12, _list: 8,
    _tool_call: 5,
}  # fmt: skip


def documents(count: int, seed: int) -> Iterator[str]:
    """`count` short texts; the same ones for the same seed."""
    rng = random.Random(seed)
    for maker in rng.choices(list(MAKERS), weights=list(MAKERS.values()), k=count):
        yield maker(rng)
