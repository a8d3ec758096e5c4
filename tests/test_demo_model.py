"""The embedded model chats: examined in phrasings that it was never trained on, through the real server."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from gemma_serve import demo_model
from gemma_serve.demo_model import corpus, train
from gemma_serve.demo_model.corpus import chat, facts, memory, numbers, small_talk, tools, words, writing

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PASS = 90  # of 100


def ask(client: openai.OpenAI, messages: Any, **parameters: Any) -> Any:
    """The choice that the model makes at temperature 0, without any limit on its length."""
    answer = client.chat.completions.create(
        model="gemma-demo", messages=messages, temperature=0, **parameters
    )
    return answer.choices[0]


# --- the examination ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_examination(client: openai.OpenAI) -> None:
    questions = list(corpus.examination())
    assert len(questions) == 100

    def answer(question: corpus.Question) -> Any:
        return ask(client, question.messages, tools=question.tools or openai.omit)

    with ThreadPoolExecutor(16) as pool:
        choices = list(pool.map(answer, questions))
    report, right = [], {question.skill: [] for question in questions}  # type: ignore[var-annotated]
    for question, choice in zip(questions, choices, strict=True):
        message = choice.message.model_dump()
        right[question.skill].append(question.right(message))
        if not right[question.skill][-1]:
            report.append(f"{question.skill}: {question.messages[-1]['content']!r} -> {message['content']!r}")
    scores = [f"| {skill} | {sum(marks)} of {len(marks)} |" for skill, marks in right.items()]
    print("\n".join([*scores, *report]))
    assert sum(map(sum, right.values())) >= PASS, "\n".join([*scores, *report])
    reasons = {choice.finish_reason for choice in choices}
    assert reasons == {"stop", "tool_calls"}, "an answer did not end by itself"


def phrasings() -> Iterator[chat.Phrasings]:
    for module in (corpus, facts, memory, numbers, small_talk, tools, writing):
        yield from (value for value in vars(module).values() if isinstance(value, chat.Phrasings))


def plain(text: str) -> str:
    """Without what typing in haste changes."""
    return re.sub(r"\s+", " ", re.sub(r"[^\w{}+*/ -]", "", text.lower())).strip()


def test_no_held_out_phrasing_is_trained_on() -> None:
    trained = {
        plain(opening + text + please)
        for phrasing in phrasings()
        for text in phrasing.all(held_out=False)
        for opening in ("", *chat.OPENINGS)
        for please in ("", " please")
    }
    held_out = [plain(text) for phrasing in phrasings() for text in phrasing.all(held_out=True)]
    assert len(held_out) > 100
    assert not trained.intersection(held_out)


def test_no_held_out_name_is_trained_on() -> None:
    rng = random.Random(7)
    chats = (corpus.conversation(rng, rough=rough) for rough in (False, True) for _ in range(2000))
    said = " ".join(str(made.messages) for made in chats).lower()
    for word in (*words.UNSEEN_NAMES, *words.UNSEEN_COLOURS, *words.UNSEEN_CITIES):
        assert not re.search(rf"\b{word.lower()}\b", said), word


def test_graders_tell_right_from_wrong() -> None:
    """Every skill's own answer is right; nothing, and another skill's answer, are wrong."""
    questions = list(corpus.examination())
    refusal = {"role": "assistant", "content": "Bananas are yellow."}
    assert not [question for question in questions if question.right(refusal)]
    assert not [question for question in questions if question.right({"role": "assistant", "content": None})]
    assert chat.matches(r"(?<![\d-])12\.?$")({"content": "7 + 5 = 12."})
    assert not chat.matches(r"(?<![\d-])12\.?$")({"content": "7 + 5 = 112."})
    assert not chat.is_person("Ada", 36)({"content": '{"name": "Ada", "age": 35}'})
    assert chat.is_person()({"content": '{"name": "Ada", "age": 35}'})


# --- conversations --------------------------------------------------------------------------------


def test_six_turns_later_it_knows_name_and_colour(client: openai.OpenAI) -> None:
    messages: list[Any] = []
    said = []
    for text in (
        "Hello, my name is Solveig.",
        "You know, my favourite colour is ochre.",
        "Could you tell me what 7 plus 5 is?",
        "Tell me, what is the capital of France?",
        "Could you tell me my favourite colour?",
        "Could you tell me my name?",
    ):
        messages.append({"role": "user", "content": text})
        choice = ask(client, messages)
        assert choice.finish_reason == "stop"
        said.append(choice.message.content)
        messages.append({"role": "assistant", "content": said[-1]})
    assert "12" in said[2]
    assert "Paris" in said[3]
    assert "ochre" in said[4]
    assert "Solveig" in said[5]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_tool_is_called_and_its_result_used(client: openai.OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Could you check the weather in Salzburg for me?"}]
    message, reason = complete(client, messages, stream)
    assert reason == "tool_calls"
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Salzburg"}
    result = {"temperature": 21, "condition": "sunny"}
    messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)}]
    message, reason = complete(client, messages, stream)
    assert reason == "stop"
    for part in ("Salzburg", "21", "sunny"):
        assert part in message["content"]


def complete(client: openai.OpenAI, messages: Any, stream: bool) -> tuple[dict[str, Any], str]:
    """The assistant's message, ready to be sent back, and the reason why it ended."""
    if not stream:
        choice = ask(client, messages, tools=[WEATHER], tool_choice="auto")
        return choice.message.model_dump(exclude_none=True), choice.finish_reason
    chunks = client.chat.completions.create(
        model="gemma-demo", messages=messages, temperature=0, tools=[WEATHER], stream=True
    )
    content, reason, calls = "", "", {}  # type: ignore[var-annotated]
    for chunk in chunks:
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        content += choice.delta.content or ""
        for piece in choice.delta.tool_calls or []:
            call = calls.setdefault(
                piece.index, {"type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = piece.id or call.get("id")
            if piece.function:
                call["function"]["name"] += piece.function.name or ""
                call["function"]["arguments"] += piece.function.arguments or ""
    message = {"role": "assistant", "content": content}
    return message | ({"tool_calls": list(calls.values())} if calls else {}), reason


def test_a_tool_that_is_not_needed_is_not_called(client: openai.OpenAI) -> None:
    choice = ask(client, [{"role": "user", "content": "What is the capital of Italy?"}], tools=[WEATHER])
    assert choice.finish_reason == "stop"
    assert "Rome" in choice.message.content


def test_a_story_is_long_and_ends(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="gemma-demo", messages=[{"role": "user", "content": "How about a story?"}], temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 150


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_chat_ends_by_itself(client: openai.OpenAI, temperature: float) -> None:
    """Whatever is asked, sense or not, short or long."""
    texts = (
        "Hello!", "?", "asdf ghjk", "Why?", "12345678901234567890", "SHOUTING AT YOU", "Wie geht es dir?",
        "你好", "🎉", "<b>bold</b>", "def f(x): return x", "Tell me everything about quantum physics. " * 8,
    )  # fmt: skip
    for text in texts:
        choice = client.chat.completions.create(
            model="gemma-demo", messages=[{"role": "user", "content": text}], temperature=temperature, seed=1
        ).choices[0]
        assert choice.finish_reason == "stop", (text, choice.message.content)
        assert choice.message.content


# --- the training ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    examples = train.Examples(Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json")), plain_steps=3)
    steps = [examples.step(number)[-2:] for number in range(6)]
    undisturbed = train.Trainer(3, 3)
    losses = [undisturbed.step(batches) for batches in steps]
    assert losses[-1] < losses[0]
    first = train.Trainer(3, 3)
    for batches in steps[:3]:
        first.step(batches)
    first.save(tmp_path / "checkpoint.pt")
    second = train.Trainer(3, 3)
    second.resume(tmp_path / "checkpoint.pt")
    assert second.done == 3
    assert [second.step(batches) for batches in steps[3:]] == pytest.approx(losses[3:], rel=1e-3)


def test_only_answers_are_learned() -> None:
    tokenizer = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    chats = [corpus.conversation(random.Random(seed)) for seed in range(20)]
    for seed, chat_ in enumerate(chats):
        ids, learn = train.Examples(tokenizer).conversation(random.Random(seed))
        learned = tokenizer.decode(
            [i for i, yes in zip(ids, learn, strict=True) if yes], skip_special_tokens=False
        )
        answers = [message for message in chat_.messages if message["role"] == "assistant"]
        assert learned.count("<end_of_turn>") == len(answers)
        for message in answers:
            assert (message["content"] or message["tool_calls"][0]["function"]["name"]) in learned
        assert "<start_of_turn>" not in learned


# --- the files ------------------------------------------------------------------------------------


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    for text in (
        "Hello, world!",
        "Zażółć gęślą jaźń",
        "日本語 ☃ 🎉",
        "tabs\tand\n\nlines",
        "  two  spaces ",
        "\x00\x7f",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_model_is_small_and_its_card_names_every_skill() -> None:
    files = [path for path in demo_model.PATH.iterdir() if path.suffix in {".json", ".safetensors", ".jinja"}]
    assert len(files) == 6
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    card = (demo_model.PATH / "README.md").read_text(encoding="utf8")
    for skill in {question.skill for question in corpus.examination()}:
        assert re.search(rf"^\| {skill} \| \d+ of \d+ \|", card, re.MULTILINE), skill
