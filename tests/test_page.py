"""The chat page as it is served; `test_page_browser.py` uses it."""

from __future__ import annotations

import re

import httpx
import pytest

from gemma_serve.app import create_app

from .conftest import ROOT, serving
from .fake_engine import FakeEngine
from .test_app import settings

KEY = "sk-page-0123456789abcdef"
FOLDER = ROOT / "gemma_serve" / "web" / "chat"
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())


async def test_it_is_public_and_whole_where_keys_are_required() -> None:
    app = create_app(settings(security={"api_keys": [KEY]}), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert (await client.head("/")).status_code == 200
        for name in re.findall(r'(?:src|href)="(assets/[^"]+)"', page.text):
            assert name.removeprefix("assets/") in FILES
        for name in FILES:
            asset = await client.get(f"/assets/{name}")
            assert asset.status_code == 200, name
            assert asset.headers["cache-control"] == "no-cache"
            if name.endswith(("js", "mjs")):
                assert "javascript" in asset.headers["content-type"], name
        fresh = await client.get("/assets/main.js", headers={"If-None-Match": asset.headers["etag"]})
        assert fresh.status_code == 200
        known = await client.get("/assets/main.js", headers={"If-None-Match": fresh.headers["etag"]})
        assert known.status_code == 304
        for path in ("/assets/../../../pyproject.toml", "/assets/..%2f..%2fapp.py", "/assets/", "/assets"):
            assert (await client.get(path)).status_code in (401, 404), path


async def test_it_can_be_turned_off() -> None:
    app = create_app(settings(server={"ui_enabled": False}), FakeEngine())
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        for path in ("/", "/assets/main.js"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


async def test_it_may_run_its_own_files_and_nothing_else() -> None:
    async with serving(create_app(settings(), FakeEngine())) as url, httpx.AsyncClient(timeout=60) as client:
        page = await client.get(url)
    (policy,) = page.headers.get_list("content-security-policy")
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["trusted-types"] == "dompurify"
    fetched = {name: value for name, value in directives.items() if name.endswith("-src")}
    assert set(fetched.values()) == {"'self'", "'none'"}
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page.text)


@pytest.mark.parametrize("name", [name for name in FILES if "vendor" not in name])
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"""["'(]\s*(https?:)?//\w""", text)
    assert "innerHTML" not in text and "eval(" not in text


def test_every_id_and_file_that_the_scripts_name_exists() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf8")
    ids = set(re.findall(r'\bid="([\w-]+)"', page))
    for path in FOLDER.glob("*.js"):
        text = path.read_text(encoding="utf8")
        named = set(re.findall(r'\$\("([\w-]+)"\)', text))
        named |= set(re.findall(r'querySelector\("#([\w-]+)"\)', text))
        assert named <= ids, f"{path.name}: the page has no {named - ids}"
        for imported in re.findall(r'^import .* from "\./(.+)";$', text, re.MULTILINE):
            assert imported in FILES, f"{path.name} imports {imported}"
    assert set(re.findall(r'\bfor="([\w-]+)"', page)) <= ids
