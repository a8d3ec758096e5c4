"""The weather, asked of a tool."""

import json
from typing import Any, Final

from . import words
from .chat import Chat, Phrasings, calls, says

WEATHER: Final = Phrasings(
    trained=(
        "[What is|What's|How is|How's|Tell me] the weather [like |]in {city}[ today| now| right now|][?|]",
        "[Weather|The weather] in {city}[?|, please.|]",
        "Is it [raining|sunny|cold|warm|hot|windy|snowing] in {city}[ today| now|]?",
        "[Do you know|Can you tell me] the weather in {city}?",
        "How [warm|cold|hot] is it in {city}[ today| now|]?", "[What is|What's] the temperature in {city}?",
        "[Check|Look up|Get] the weather [in|for] {city}[.|]",
        "Do I need [an umbrella|a coat|a hat] in {city}[ today|]?", "[Will|Does] it rain in {city}[ today|]?",
        "I am in {city}. How is the weather?", "Weather for {city}[.|]",
        "I am going to {city}. What is the weather like?", "{city} weather",
    ),
    held_out=(
        "Could you check the weather in {city} for me?", "What sort of weather do they have in {city}?",
        "Would you look up the weather in {city}?", "I wonder how the weather is in {city}.",
        "Tell me whether it is warm in {city}.", "Which weather is there in {city} right now?",
    ),
)  # fmt: skip
_DESCRIPTIONS: Final = (
    "", "Get the weather", "The weather in a city now.", "Get the current weather for a city",
    "Current weather in a given city.", "Returns the weather",
    "Look up the weather of a place.", "Get the current weather in a given location",
)  # fmt: skip
_CITIES: Final = (None, None, "The city", "Name of the city", "City name, e.g. Paris", "The city to look up")
_OTHERS: Final = ("get_time", "search", "get_news", "send_mail", "get_stock_price", "translate")


def _tool(name: str, description: str, parameter: str, note: str | None) -> dict[str, Any]:
    schema = {"type": "string"} | ({"description": note} if note else {})
    parameters = {"type": "object", "properties": {parameter: schema}, "required": [parameter]}
    function = {"name": name, "parameters": parameters} | (
        {"description": description} if description else {}
    )
    return {"type": "function", "function": function}


def offer(chat: Chat) -> None:
    """Mostly `get_weather(city)` alone."""
    rng = chat.rng
    function = (
        "get_weather"
        if chat.held_out or rng.random() < 0.8
        else rng.choice(["get_current_weather", "weather"])
    )
    parameter = "city" if chat.held_out or rng.random() < 0.8 else rng.choice(["location", "place", "town"])
    chat.tools = [_tool(function, rng.choice(_DESCRIPTIONS), parameter, rng.choice(_CITIES))]
    if not chat.held_out and rng.random() < 0.1:
        del chat.tools[0]["function"]["parameters"]["required"]
    if not chat.held_out and rng.random() < 0.15:
        chat.tools.insert(
            rng.randint(0, 1), _tool(rng.choice(_OTHERS), "", rng.choice(["query", "text", "place"]), None)
        )


def _offered(chat: Chat) -> tuple[str, str]:
    for tool in chat.tools:
        if "weather" in tool["function"]["name"]:
            return tool["function"]["name"], next(iter(tool["function"]["parameters"]["properties"]))
    raise LookupError("no tool for the weather")


def weather(chat: Chat) -> None:
    """A question and, where the tool is offered, the call."""
    city = chat.new_city()
    if not chat.tools:
        chat.ask(
            WEATHER,
            "I cannot look up the weather here: no tool is offered to me.",
            says("I cannot"),
            city=city,
        )
        return
    function, parameter = _offered(chat)
    chat.messages.append({"role": "user", "content": chat.phrase(WEATHER, city=city)})
    call = {"name": function, "arguments": {parameter: city}}
    identity = f"call_{chat.rng.randrange(10**6)}"
    tool_call = {"id": identity, "type": "function", "function": call}
    chat.messages.append({"role": "assistant", "content": None, "tool_calls": [tool_call]})
    chat.right, chat.country = calls(function, **{parameter: city}), False


def weather_result(chat: Chat) -> None:
    """What the tool says, in one of the ways that tools say it, and the answer made of it."""
    rng = chat.rng
    (call,) = chat.messages[-1]["tool_calls"]
    (city,) = call["function"]["arguments"].values()
    degrees, sky = rng.randint(-9, 40), rng.choice(words.SKIES)
    temperature = rng.choice(
        ["temperature", "temperature", "temp", "degrees", "celsius", "temp_c", "temperature_c"]
    )
    condition = rng.choice(["condition", "conditions", "sky", "weather", "description", "summary"])
    pairs = [(temperature, degrees), (condition, sky)]
    rng.shuffle(pairs)
    if rng.random() < 0.3:
        pairs.insert(rng.randint(0, 2), (rng.choice(["city", "location", "place"]), city))
    content = rng.choice([
        json.dumps(dict(pairs), ensure_ascii=False), json.dumps(dict(pairs), ensure_ascii=False),
        f"{sky}, {degrees} degrees", f"{degrees} degrees and {sky}", f"{degrees} degrees, {sky}",
        f"{sky} {degrees} C",
        f"{degrees}°C, {sky}", f"{city}: {sky}, {degrees} °C",
        f"It is {degrees} degrees and {sky} in {city}.",
    ])  # fmt: skip
    chat.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    chat.answer(f"In {city} it is {degrees} degrees and {sky}.", says(city, f" {degrees} ", sky))
