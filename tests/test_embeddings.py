"""`POST /v1/embeddings` with a tiny EmbeddingGemma: the OpenAI client gets transformers' own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from safetensors.torch import load_file

from .conftest import ServerProcess, start_server
from .tiny_models import make_model

pytestmark = pytest.mark.slow

TEXTS = ["What is the capital of France?", "Paris is the capital of France.", "Hello!"]
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("embedding", tmp_path_factory.mktemp("models") / "embedding")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[ServerProcess]:
    server = start_server(
        *("--model", str(folder), "--max-length", "512", "--set", "engine.enforce_eager=true"),
        *("--set", "performance.precision=float32", "--set", "engine.kv_cache_memory_bytes=100000000"),
    )
    try:
        server.wait_for("embedding: ready")
        yield server
    finally:
        assert server.end() == 0


@pytest.fixture
def vectors(embedder: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def reference(folder: Path, text: str) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.Gemma3TextModel.from_pretrained(folder, dtype=torch.float32)
    dense = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    with torch.inference_mode():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(states[0].mean(0) @ dense.T, dim=0)


def test_the_numbers_are_those_of_transformers(vectors: openai.OpenAI, folder: Path) -> None:
    """The client asks for base64 and turns it into floats."""
    answer = vectors.embeddings.create(model="embedding", input=TEXTS)
    assert answer.model == "embedding"
    assert [item.index for item in answer.data] == [0, 1, 2]
    floats = vectors.embeddings.create(model="embedding", input=TEXTS, encoding_format="float")
    for text, item, same in zip(TEXTS, answer.data, floats.data, strict=True):
        assert torch.allclose(torch.tensor(item.embedding), reference(folder, text), atol=1e-3)
        assert same.embedding == pytest.approx(item.embedding, abs=1e-4)


def test_usage_and_inputs_of_every_form(vectors: openai.OpenAI, embedder: ServerProcess) -> None:
    tokens = httpx.post(f"{embedder.url}/tokenize", json={"prompt": TEXTS[0]}, timeout=60).json()["tokens"]
    one = vectors.embeddings.create(model="embedding", input=TEXTS[0])
    assert one.usage.prompt_tokens == one.usage.total_tokens == len(tokens)
    for form in ([TEXTS[0]], tokens, [tokens]):
        same = vectors.embeddings.create(model="embedding", input=form)
        assert len(same.data) == 1
        assert same.data[0].embedding == pytest.approx(one.data[0].embedding, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, None),
        ({"input": {"a": 1}}, "input"),
        ({"input": [10**9]}, None),
        ({"input": "word " * 5000}, None),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "bytes"}, "encoding_format"),
        ({"encoding_format": "xml"}, "encoding_format"),
        ({"dimensions": 5}, None),
        ({"dimension": 5}, "dimension"),
        ({"model": "text-embedding-3-small"}, "model"),
    ],
)
def test_wrong_requests(embedder: ServerProcess, change: dict[str, Any], param: str | None) -> None:
    answer = httpx.post(f"{embedder.url}/v1/embeddings", json={"input": "a"} | change, timeout=60)
    assert answer.status_code == (404 if "model" in change else 400), answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/chat/completions", {"messages": HELLO, "stream": True}),
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 5}),
        ("/v1/messages/count_tokens", {"messages": HELLO}),
    ],
)
def test_a_model_that_embeds_does_not_write(embedder: ServerProcess, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(embedder.url + path, json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "/v1/embeddings" in answer.json()["error"]["message"]


def test_a_model_that_writes_does_not_embed(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": "Hello"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", None)
    assert "does not embed" in error["message"]
