"""Images: read where the model takes them, refused where it does not, fetched from public addresses only."""

from __future__ import annotations

import base64
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from .conftest import ServerProcess
from .local_images import LocalImages, png
from .test_families import PROMPT, check_call, check_float16, check_roles, start_family
from .tiny_models import without_torchvision

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a tiny multimodal Gemma 3."""
    environ = without_torchvision(tmp_path_factory.mktemp("plugin")) | {"VLLM_MEDIA_FETCH_MAX_RETRIES": "1"}
    server = start_family("gemma3", tmp_path_factory.mktemp("models"), environ=environ)
    try:
        server.wait_for("gemma3: ready")
        yield server
    finally:
        assert server.end() == 0


@pytest.fixture
def images() -> Iterator[LocalImages]:
    with LocalImages() as images:
        yield images


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def chat(url: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}


def routes(url: str) -> list[tuple[str, dict[str, Any]]]:
    """A request with the image on every route that takes one."""
    response = [{"role": "user", "content": [{"type": "input_image", "image_url": url, "detail": "auto"}]}]
    source = {"type": "url", "url": url}
    message = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    return [
        ("/v1/chat/completions", chat(url)),
        ("/v1/chat/completions", chat(url) | {"stream": True}),
        ("/v1/responses", {"input": response, "max_output_tokens": 4}),
        ("/v1/messages", {"messages": message, "max_tokens": 4}),
        ("/v1/messages/count_tokens", {"messages": message}),
        ("/tokenize", {"messages": chat(url)["messages"]}),
    ]


def test_the_family(seeing: ServerProcess) -> None:
    check_roles(seeing, PROMPT)
    check_float16("gemma3", seeing)
    check_call(seeing, {"choice": ['[get_weather(city="Paris")]']})


def test_images_are_seen(seeing: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="unused", max_retries=0) as client:
        seen = {}
        for colour in ("red", "blue"):
            request: Any = chat(data_url(png(colour))) | {"model": "gemma3", "logprobs": True}
            whole = client.chat.completions.create(**request)
            text = "".join(
                chunk.choices[0].delta.content or ""
                for chunk in client.chat.completions.create(**request, stream=True)
            )
            assert text == whole.choices[0].message.content
            seen[colour] = [token.logprob for token in whole.choices[0].logprobs.content]
        assert seen["red"] != seen["blue"]
        blind: Any = chat("")
        blind["messages"][0]["content"].pop()
        without = client.chat.completions.create(model="gemma3", **blind)
        assert whole.usage and without.usage
        assert whole.usage.prompt_tokens > without.usage.prompt_tokens + 4


def test_images_in_responses_and_messages(seeing: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="unused", max_retries=0) as client:
        part: Any = {"type": "input_image", "image_url": data_url(png("red")), "detail": "auto"}
        answer = client.responses.create(
            model="gemma3", input=[{"role": "user", "content": [part]}], max_output_tokens=4
        )
        assert answer.output_text
    with anthropic.Anthropic(base_url=seeing.url, api_key="unused", max_retries=0) as claude:
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png("red")).decode()}
        content: Any = [{"type": "image", "source": source}]
        message = claude.messages.create(
            model="gemma3", max_tokens=4, messages=[{"role": "user", "content": content}]
        )
        assert message.usage.output_tokens > 0


def bomb() -> bytes:
    """A PNG that says it has 1.6 billion pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
    "url",
    [
        *("data:image/png,abc", "data:image/png;base64,!!!", "data:image/png;base64,", "data:"),
        *(
            data_url(b"no image"),
            data_url(png("red")[:60]),
            data_url(bomb()),
            "nonsense",
            "https://",
            "http://[::1",
        ),
    ],
    ids=lambda url: url[:30],
)
def test_what_is_no_image(seeing: ServerProcess, url: str) -> None:
    for path, body in routes(url):
        answer = httpx.post(seeing.url + path, json=body, timeout=60)
        assert answer.status_code in (400, 422), (path, answer.text)
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://example.com/x.png",
        "/etc/passwd",
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://[64:ff9b::7f00:1]:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f000001:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://127.1:{port}/",
        "http://0.0.0.0:{port}/",
        "http://user:password@127.0.0.1:{port}/",
        "http://{host}:{port}/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.0.1/",
        "http://100.100.100.200/",
        "http://169.254.169.254/latest/meta-data/",
        "http://168.63.129.16/machine?comp=goalstate",
        "http://[fd00:ec2::254]/",
        "http://[fe80::1%25lo]/",
    ],
)
def test_what_is_not_public_is_never_fetched(seeing: ServerProcess, images: LocalImages, url: str) -> None:
    for path, body in routes(url.format(port=images.port, host=socket.gethostname())):
        answer = httpx.post(seeing.url + path, json=body, timeout=60)
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["message"]
    assert images.hits == []


def test_a_model_without_eyes(http: httpx.Client) -> None:
    for path, body in routes(data_url(png("red"))):
        answer = http.post(path, json=body)
        assert answer.status_code == 400, (path, answer.text)
        assert "text only" in answer.json()["error"]["message"]
