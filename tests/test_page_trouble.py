"""The chat page when things go wrong around it: networks, restarts, other tabs; and who has no mouse."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from gemma_serve.app import create_app

from .chat_client import chatting
from .chromium import Cable, needs_chromium, opened
from .conftest import serving
from .fake_engine import FakeEngine
from .test_app import settings
from .test_page_browser import answered, answers, ask, connected, texts

if TYPE_CHECKING:
    from playwright.async_api import Page

pytestmark = [needs_chromium, pytest.mark.slow]

KEY = "sk-page-0123456789abcdef"


async def test_what_was_said_before_the_connection_broke_stays_and_is_answered_again() -> None:
    engine = FakeEngine(hang_at=1)
    async with (
        serving(create_app(settings(), engine)) as url,
        Cable(url).laid() as cable,
        opened(cable.url) as (page, faults),
    ):
        faults.expected = ("ERR_", "WebSocket connection")
        await connected(page)
        await ask(page, "Hi")
        await answers(page).get_by_text("Hello").wait_for()
        cable.cut()
        await page.get_by_text("The connection broke.").first.wait_for()
        assert await texts(page) == ["Hi", "Hello"]
        engine.hang_at = None
        cable.mend()
        await connected(page)
        assert await texts(page) == ["Hi", "Hello"]  # so has the server kept it
        await page.locator(".regenerate:visible").click()
        await answers(page).get_by_text("Hello world").wait_for()
        assert await texts(page) == ["Hi", "Hello world"]


async def test_a_question_whose_answer_never_began_is_given_back() -> None:
    engine = FakeEngine(hang_at=0)
    async with (
        serving(create_app(settings(), engine)) as url,
        Cable(url).laid() as cable,
        opened(cable.url) as (page, faults),
    ):
        faults.expected = ("ERR_", "WebSocket connection")
        await connected(page)
        await ask(page, "Hi")
        await page.locator("article.assistant[aria-busy=true]").wait_for()
        cable.cut()
        await page.wait_for_selector("html[data-connection=waiting]")
        assert await page.locator("#question").input_value() == "Hi"
        assert await texts(page) == []


async def test_a_question_is_stopped_before_the_server_has_it() -> None:
    engine = FakeEngine()
    async with serving(create_app(settings(), engine)) as url, opened(url) as (page, _):
        await connected(page)
        await page.locator("#open-settings").click()
        await page.locator("#system").fill("Be kind.")
        await page.locator("#close-settings").click()
        await page.locator("#question").fill("Hi")
        # In one go: the server cannot have taken the system prompt in between.
        await page.evaluate(
            "document.forms.composer.requestSubmit(), document.getElementById('stop').click()"
        )
        await page.get_by_text("Stopped before the answer began.").wait_for()
        assert await page.locator("#question").input_value() == "Hi"
        assert await texts(page) == [] and engine.requests == []
        await page.locator("#question").press("Enter")
        await answered(page, 1)
        said = [message["content"] for message in engine.requests[-1].body["messages"]]
        assert said == ["Be kind.", "Hi"]


async def test_a_server_that_was_started_anew_gets_the_history_from_the_page() -> None:
    engine = FakeEngine()
    async with (
        serving(create_app(settings(), FakeEngine())) as url,
        serving(create_app(settings(), engine)) as anew,
        Cable(url).laid() as cable,
        opened(cable.url) as (page, faults),
    ):
        faults.expected = ("ERR_", "WebSocket connection")
        await connected(page)
        await ask(page, "Before")
        await answered(page, 1)
        cable.cut()
        await page.wait_for_selector("html:not([data-connection=connected])")
        cable.lead_to(anew)
        cable.mend()
        await connected(page)
        assert await texts(page) == ["Before", "Hello world"]
        await ask(page, "After")
        await answered(page, 2)
        said = [message["content"] for message in engine.requests[-1].body["messages"]]
        assert said == ["Before", "Hello world", "After"]


async def test_two_tabs_of_one_chat_see_what_the_other_said() -> None:
    async with serving(create_app(settings(), FakeEngine())) as url, opened(url) as (page, _):
        await connected(page)
        await ask(page, "One")
        await answered(page, 1)
        async with (
            page.expect_popup() as opening
        ):  # it gets a copy of the tab's storage, as a tab "duplicated" does
            await page.evaluate("void window.open(location.href)")
        twin = await opening.value
        await connected(twin)
        await answers(twin).first.wait_for()
        assert await texts(twin) == ["One", "Hello world"]
        await ask(twin, "Two")
        await answers(twin).nth(1).get_by_text("Hello world").wait_for()
        await ask(page, "Three")
        await answers(page).nth(2).wait_for()
        assert (await texts(page))[::2] == ["One", "Two", "Three"]


async def test_a_history_as_large_as_may_be_is_shown() -> None:
    turns = [
        {"role": role, "content": f"{number} " + "**word** `code` " * 60}
        for number in range(500)
        for role in ("user", "assistant")
    ]
    async with serving(create_app(settings(), FakeEngine())) as url, chatting(url) as chat:
        assert (await chat.ask("load", messages=turns))["type"] == "session"
        async with opened(url) as (page, _):
            await connected(page)
            await page.evaluate(f"sessionStorage.setItem('session', '{chat.session_id}')")
            await page.reload()
            await answers(page).nth(499).wait_for(state="attached")
            assert await page.evaluate(
                "(({scrollTop, clientHeight, scrollHeight}) => scrollHeight - scrollTop - clientHeight)"
                "(document.getElementById('scroll')) < 2"
            )
            await page.locator("#new-chat").click()
            await answers(page).first.wait_for(state="detached")


async def test_markdown_that_would_take_for_ever_is_shown_as_it_stands() -> None:
    bomb = "**a _" * 4_000
    async with serving(create_app(settings(), FakeEngine((bomb,)))) as url, opened(url) as (page, _):
        await connected(page)
        await ask(page, "Hi")
        await answered(page, 1)
        assert await answers(page).locator(".plain").inner_text() == bomb


async def focused(page: Page) -> str:
    return str(await page.evaluate("document.activeElement.id || document.activeElement.className"))


async def test_a_keyboard_is_enough() -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(create_app(settings(), engine)) as url, opened(url) as (page, _):
        press = page.keyboard.press
        await connected(page)
        assert await focused(page) == "question"
        await page.keyboard.type("Hi")
        await press("Enter")
        await answers(page).get_by_text("Hello").wait_for()
        await press("Tab")
        assert await focused(page) == "stop"
        await press("Enter")
        await answered(page, 1)
        assert await focused(page) == "question"
        engine.hang_at = None
        reached = set()
        for _ in range(12):  # everything on the page, backwards
            await press("Shift+Tab")
            reached.add(await focused(page))
        assert reached >= {"regenerate", "copy", "edit", "theme", "open-settings", "new-chat", "model"}
        while await focused(page) != "open-settings":
            await press("Tab")
        await press("Enter")
        await page.locator("dialog[open] #key").wait_for()
        await press("Escape")
        await page.locator("#question:focus").wait_for()  # the dialog's close event comes later
        while await focused(page) != "edit":
            await press("Shift+Tab")
        await press("Enter")
        await page.keyboard.type("!")
        await press("Enter")
        await answers(page).get_by_text("Hello world").wait_for()
        assert (await texts(page))[0] == "Hi!"


async def test_nothing_moves_for_who_wants_it_so() -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(create_app(settings(), engine)) as url, opened(url) as (page, _):
        await connected(page)
        await ask(page, "Hi")
        await answers(page).get_by_text("Hello").wait_for()
        moving = "document.getAnimations().length > 0"
        await page.emulate_media(reduced_motion="no-preference")
        assert await page.evaluate(moving)
        await page.emulate_media(reduced_motion="reduce")
        assert not await page.evaluate(moving)


async def test_the_key_stands_in_no_address_no_log_and_nothing_that_lasts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "gemma_serve")
    app = create_app(settings(security={"api_keys": [KEY]}), FakeEngine())
    asked: list[str] = []
    async with serving(app) as url, opened(url) as (page, faults):
        faults.expected = ("401",)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        await page.locator("dialog[open] #key:focus").wait_for()
        await page.keyboard.type(KEY)
        await page.keyboard.press("Enter")
        await connected(page)
        await ask(page, "Hi")
        await answered(page, 1)
        assert any(address.startswith("ws") for address in asked)
        assert not any(KEY in address for address in [*asked, page.url])
        assert KEY not in await page.evaluate("JSON.stringify(localStorage) + document.cookie")
    assert "WEBSOCKET /ws chat" in caplog.text and KEY not in caplog.text
