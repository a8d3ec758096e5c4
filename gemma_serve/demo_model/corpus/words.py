"""The words of the corpus: lists, and names that nobody has."""

import random
from typing import Final


def split(text: str) -> list[str]:
    return text.split()


NAMES: Final = split("""
    Ada Ahmed Alex Ali Alice Amir Ana Anna Ben Bob Carla Carlos Chen Chloe Clara Daniel David Diego Elena
    Emma Eva Fatima Felix Grace Hana Hans Henry Hugo Ines Isabel Ivan Jack Jane John Joe Julia Karim Kate
    Kenji Laura Leo Lily Lina Linda Liam Lucas Lucy Mali Marco Maria Mark Max Maya Mei Mia Mike Mina Mohamed
    Nadia Nina Noah Nora Olga Olivia Omar Oscar Paul Pedro Peter Priya Raj Rita Robert Rosa Ruth Sam Sara
    Sofia Steve Susan Tara Tim Tom Vera Victor William Yara Yuki Zoe
""")
# In no text of the training: a model that recalls one of these copies it.
UNSEEN_NAMES: Final = split("""
    Ingrid Tobias Wanda Quentin Kofi Beatrix Rupert Solveig Dmitri Zelmira Odette Thandi Barnaby Yusuf
    Marlow Tilda Fergus Leopold Xenia Kerstin
""")

COLOURS: Final = split("""
    red blue green yellow orange purple pink black white grey brown gold silver turquoise teal violet
    indigo lime beige navy cyan magenta coral olive
""")
SHADES: Final = ("dark", "light", "pale", "bright", "deep", "soft")
UNSEEN_COLOURS: Final = split("""
    crimson ochre mauve khaki lavender maroon amber scarlet emerald peach
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
    "Uruguay": "Montevideo", "Vietnam": "Hanoi", "Zambia": "Lusaka", "the Netherlands": "Amsterdam",
}  # fmt: skip

NOUNS: Final = split("""
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

ADJECTIVES: Final = split("""
    angry beautiful big blue bold brave bright broken brown busy careful cheap clean clever cloudy cold
    curious dark deep different difficult dirty dry early easy empty famous fast favourite fine fresh
    friendly full funny gentle glad golden good great green happy hard heavy high honest hot hungry
    important kind large late lazy little lonely long loud lucky modern narrow new nice noisy old open
    patient perfect polite poor pretty proud quick quiet rainy ready red rich round sad safe sharp short
    shy silent silver simple sleepy slow small smart soft special strange strong sunny sweet tall thin
    tiny tired useful warm weak white wide wild windy wise wonderful wooden wrong yellow young
""")

VERBS: Final = split("""
    answer ask bake begin borrow bring build buy call carry catch change choose clean climb close come
    cook count cross cry dance decide describe discover draw drink drive eat explain fall feel find
    finish fly follow forget give go grow hear help hide hold invite jump keep know laugh learn leave
    like listen live look lose love make meet miss move need notice open paint plan play promise pull
    push put read remember rest return ride run save say see sell send share show sing sit sleep smile
    speak stand start stay stop study swim take talk teach tell thank think throw touch travel try turn
    understand use visit wait wake walk want wash watch win wish wonder work write
""")

FUNCTION_WORDS: Final = split("""
    a an the at in on of to out up off over down away yet just so now here there you me it us them this that
    please and or but if then when how who all any some more never always too very not no yes
""")

CITIES: Final = split("""
    Amsterdam Barcelona Bristol Chicago Cologne Dallas Denver Dubai Edinburgh Florence Geneva Hamburg
    Houston Istanbul Kyoto Lagos Leeds Liverpool Lyon Manchester Marseille Melbourne Miami Milan Montreal
    Mumbai Munich Naples Osaka Porto Seattle Seville Shanghai Sydney Toronto Turin Valencia Vancouver Venice
    Zurich
""")
UNSEEN_CITIES: Final = (
    "Antwerp",
    "Salzburg",
    "Bilbao",
    "Gothenburg",
    "Ghent",
    "Lille",
    "Perth",
    "Rotterdam",
)
SKIES: Final = (
    "sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear", "partly cloudy",
    "raining", "overcast", "light rain",
)  # fmt: skip

_UNSEEN: Final = {word.lower() for word in (*UNSEEN_NAMES, *UNSEEN_COLOURS, *UNSEEN_CITIES)}
_ONSETS: Final = (
    *"bcdfghjklmnprstvwyz", "br", "ch", "cl", "dr", "fl", "gr", "kr", "pl", "sh", "st", "th", "tr", "qu", "x",
)  # fmt: skip
_VOWELS: Final = (*"aaeeiioou", "ai", "ee", "ei", "ia", "oo", "ou")
_CODAS: Final = (
    "",
    "",
    "",
    "",
    "n",
    "r",
    "l",
    "s",
    "m",
    "t",
    "d",
    "k",
    "x",
    "th",
    "nd",
    "rt",
    "ck",
    "ss",
    "v",
)


def invented(rng: random.Random) -> str:
    """A word that nobody has, such as `krelan` or `gardle`: copying it cannot be done by heart."""
    if rng.random() < 0.5:
        start, end = rng.choice(_SPELLINGS), rng.choice(_SPELLINGS)
        word = start[: rng.randint(1, 4)] + end[-rng.randint(1, 5) :]
    else:
        syllables = rng.choice([1, 2, 2, 2, 3])
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
        word += rng.choice(_CODAS)
    return word if len(word) > 2 and word not in _UNSEEN else invented(rng)


_SPELLINGS: Final = [
    word.lower() for word in (*NAMES, *NOUNS, *ADJECTIVES, *VERBS, *COLOURS, *CITIES, *CAPITALS.values())
    if word.isalpha() and word.isascii()
]  # fmt: skip
UNITS: Final = split("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
""")
