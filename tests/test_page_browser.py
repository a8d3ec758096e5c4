"""The chat page in a browser: with the real engine where answers count, else with the fake one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from gemma_serve.app import create_app
from gemma_serve.engine.base import EngineState

from .chromium import SCREENSHOTS, SIZES, Cable, needs_chromium, opened
from .conftest import ServerProcess, serving
from .fake_engine import FakeEngine
from .test_app import settings
from .xss_corpus import XSS

if TYPE_CHECKING:
    from playwright.async_api import Locator, Page

pytestmark = [needs_chromium, pytest.mark.slow]

KEY = "sk-page-0123456789abcdef"
MARKDOWN = """To reverse a **linked list**, walk it once and turn each pointer around:

```python
def reverse(head):
    previous = None
    while head is not None:
        head.next, previous, head = previous, head, head.next
    return previous
```

| Way | Time | Memory |
|---|---|---|
| this loop | O(n) | O(1) |
| recursion | O(n) | O(n) |

At the end `previous` is the new head, see [Wikipedia](https://en.wikipedia.org/wiki/Linked_list).
"""
ALLOWED = {
    *(
        "A",
        "BLOCKQUOTE",
        "BR",
        "BUTTON",
        "CODE",
        "DEL",
        "DIV",
        "EM",
        "H1",
        "H2",
        "H3",
        "H4",
        "H5",
        "H6",
        "HR",
    ),
    *("LI", "OL", "P", "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL"),
}
"""What an answer may consist of; button, div and span are the page's own, of code blocks."""


async def connected(page: Page) -> None:
    await page.wait_for_selector("html[data-connection=connected]")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant")


async def ask(page: Page, text: str) -> None:
    await page.locator("#question").fill(text)
    await page.locator("#question").press("Enter")


async def answered(page: Page, count: int) -> None:
    """Until there are so many whole answers, with their figures."""
    await page.locator("article.assistant[aria-busy=false] .figures:not(:empty)").nth(count - 1).wait_for()
    await page.locator("#stop").wait_for(state="hidden")


async def texts(page: Page) -> list[str]:
    return [text.strip() for text in await page.locator("article .text").all_inner_texts()]


async def limit_answers(page: Page, tokens: int) -> None:
    await page.locator("#open-settings").click()
    await page.locator("#max_tokens").fill(str(tokens))
    await page.locator("#close-settings").click()


async def test_three_turns_with_the_real_engine_and_the_history_after_a_reload(live: ServerProcess) -> None:
    async with opened(live.url) as (page, _):
        await connected(page)
        await limit_answers(page, 16)
        for turn in range(3):
            await ask(page, f"Question {turn}")
            await answered(page, turn + 1)
        said = await texts(page)
        assert said[::2] == ["Question 0", "Question 1", "Question 2"] and all(said[1::2])
        figures = await answers(page).last.locator(".figures").inner_text()
        assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after \d", figures)

        await page.reload()
        await answers(page).nth(2).wait_for()
        assert await texts(page) == said
        await ask(page, "Question 3")
        await answers(page).nth(3).wait_for()
        await answered(page, 1)  # of the earlier ones a new page has the text only


async def test_an_answer_of_the_real_engine_is_stopped(live: ServerProcess) -> None:
    async with opened(live.url) as (page, _):
        await connected(page)
        await ask(page, "Go on and on")
        await page.locator("article.assistant .text", has_text=re.compile(r"\S.{20}")).wait_for()
        await page.keyboard.press("Escape")
        await answered(page, 1)
        assert "stopped" in await answers(page).last.locator(".figures").inner_text()


async def test_a_broken_connection_is_mended_and_the_chat_goes_on(live: ServerProcess) -> None:
    async with Cable(live.url).laid() as cable, opened(cable.url) as (page, faults):
        faults.expected = ("ERR_", "WebSocket connection")
        await connected(page)
        await limit_answers(page, 8)
        await ask(page, "Before")
        await answered(page, 1)
        said = await texts(page)
        cable.cut()
        await page.wait_for_selector("html[data-connection=waiting]")
        assert "tries again" in await page.locator("#status").inner_text()
        cable.mend()
        await connected(page)
        assert await texts(page) == said
        await ask(page, "After")
        await answered(page, 2)
        await page.reload()
        await answers(page).nth(1).wait_for()
        assert (await texts(page))[::2] == ["Before", "After"]  # one session throughout


async def test_questions_are_edited_and_answers_made_again() -> None:
    engine = FakeEngine()
    async with serving(create_app(settings(), engine)) as url, opened(url) as (page, _):
        await connected(page)
        for count, text in enumerate(("One", "Two"), 1):
            await ask(page, text)
            await answered(page, count)
        engine.words = ("Other",)
        await page.locator(".regenerate:visible").click()
        await page.get_by_text("Other").wait_for()
        assert await texts(page) == ["One", "Hello world", "Two", "Other"]
        await page.locator(".edit").first.click()
        assert await page.locator("#question").input_value() == "One"
        await ask(page, "First")
        await page.locator("article").nth(2).wait_for(state="detached")
        await answered(page, 1)
        assert await texts(page) == ["First", "Other"]
        assert [message["content"] for message in engine.requests[-1].body["messages"]] == ["First"]


async def test_the_settings_reach_the_engine() -> None:
    engine = FakeEngine()
    async with serving(create_app(settings(), engine)) as url, opened(url) as (page, _):
        await connected(page)
        await page.locator("#open-settings").click()
        await page.locator("#system").fill("Be kind.")
        await page.locator("#temperature").fill("0.5")
        await page.locator("#close-settings").click()
        await ask(page, "Hi")
        await answered(page, 1)
        body = engine.requests[-1].body
        assert body["messages"][0] == {"role": "system", "content": "Be kind."}
        assert body["temperature"] == 0.5 and body["model"] == "gemma-demo"
        assert not body.keys() & {"top_p", "top_k", "seed", "max_tokens"}  # the model's own


async def test_hostile_text_runs_nothing_wherever_it_stands() -> None:
    class Boundless(FakeEngine):  # or the long chat would have to be counted
        def model_length(self) -> None:
            return None

    assert len(XSS) == 30
    engine = Boundless()
    async with serving(create_app(settings(), engine)) as url, opened(url) as (page, faults):
        await connected(page)
        for count, text in enumerate(XSS, 1):
            await page.locator("#open-settings").click()
            await page.locator("#system").fill(text)
            await page.locator("#close-settings").click()
            engine.words = (text[: len(text) // 2], text[len(text) // 2 :])  # also half of it, for a moment
            await ask(page, text)
            await answered(page, count)
        for reading in range(2):  # from its stream, and from the session's history
            tags = await page.evaluate(
                "[...new Set([...document.querySelectorAll('.text *')].map(e => e.tagName))]"
            )
            assert set(tags) <= ALLOWED
            assert not await page.evaluate(
                "[...document.querySelectorAll('.text *')].flatMap(e => e.getAttributeNames())"
                ".filter(name => name.startsWith('on') || name === 'style' || name === 'src')"
            )
            links = await page.evaluate(
                "[...document.querySelectorAll('.text a[href]')].map(a => a.protocol)"
            )
            assert set(links) <= {"http:", "https:", "mailto:"}
            for handle in await page.locator(".text a:not([href])").all():
                await handle.click()
            assert await page.evaluate("window.pwned") is None
            faults.check()
            if reading == 0:
                await page.reload()
                await answers(page).nth(len(XSS) - 1).wait_for()


async def test_the_policy_stops_what_would_pass_the_first_wall() -> None:
    async with serving(create_app(settings(), FakeEngine())) as url, opened(url) as (page, faults):
        faults.expected = ("Content Security Policy", "Trusted Type", "TrustedHTML", "TrustedScript")
        await connected(page)
        attempts = (
            "document.body.innerHTML = '<img src=x onerror=window.pwned=1>'",
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned=1'}))",
            "const i = document.createElement('img'); i.setAttribute('onerror', 'window.pwned=1');"
            " document.body.append(i); i.src = '/nowhere'",
        )
        for attempt in attempts:
            await page.evaluate(f"() => {{ try {{ {attempt} }} catch {{}} }}")
        with pytest.raises(Exception, match=r"Failed to fetch|violates"):
            await page.evaluate("fetch('https://elsewhere.invalid/')")
        assert await page.evaluate("window.pwned") is None


async def test_what_goes_wrong_is_told_in_plain_words() -> None:
    engine = FakeEngine(ready=False)
    engine.status.set(EngineState.LOADING, "loading weights")
    config: dict[str, Any] = {"api_keys": [KEY], "rate_limit_per_minute": 4}
    async with (
        serving(create_app(settings(security=config), engine)) as url,
        opened(url) as (page, faults),
    ):
        faults.expected = ("401", "429")  # Chromium logs them
        status, alert = page.locator("#status"), page.locator("#alert")
        await page.locator("dialog[open] #key:focus").wait_for()
        assert await status.inner_text() == "This server needs an API key."
        await page.locator("#key").fill("sk-wrong")
        await page.locator("#key").press("Enter")
        await page.locator("#key-problem", has_text="does not know this API key").wait_for()
        await page.locator("#key").fill(KEY)
        await page.locator("#key").press("Enter")
        await connected(page)
        assert await page.evaluate("JSON.stringify(localStorage)") == "{}"
        await page.get_by_text("loading weights").first.wait_for()
        await ask(page, "Hi")
        await page.get_by_text("The model is still loading.").wait_for()
        assert await page.locator("#question").input_value() == "Hi"  # for another try
        engine.status.set(EngineState.READY)
        for _ in range(4):
            await page.locator("#question").fill("Hi")
            await page.locator("#question").press("Enter")
            await page.locator("#stop").wait_for(state="hidden")
        await page.get_by_text("too much for the limits of this key").wait_for()
        assert "Try again in" in await alert.inner_text()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_how_it_looks(size: str, theme: str) -> None:
    engine = FakeEngine(tuple(re.findall(r"\s*\S+", MARKDOWN)), pause=0.02)
    async with (
        serving(create_app(settings(), engine)) as url,
        opened(url, size=size, dark=theme == "dark") as (page, _),
    ):
        await connected(page)
        await ask(page, "How do I reverse a linked list?")
        await answered(page, 1)
        assert await page.locator(".copy-code").count() == 1
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=SCREENSHOTS / f"{theme}-{size}.png")
        before = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        await page.locator("#theme").click()
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != before
