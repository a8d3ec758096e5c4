"""Where media are fetched from: every hop of every request is to a public address, or to a listed domain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import vllm.envs
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from gemma_serve.engine import media
from gemma_serve.errors import InvalidRequest, ServeError, Unprocessable

from .local_images import LocalImages


@pytest.fixture
def images() -> Iterator[LocalImages]:
    with LocalImages() as images:
        yield images


def connector(**options: Any) -> media.PublicMediaConnector:
    """New connections each time: those of aiohttp belong to one event loop."""
    connector = media.PublicMediaConnector(**options)
    connector.connection = type(connector.connection)(anywhere=bool(options.get("allowed_media_domains")))
    return connector


async def fetch(connector: media.PublicMediaConnector, url: str) -> Image.Image:
    try:
        found: Image.Image = (await connector.fetch_image_async(url)).media
        return found
    finally:
        await (await connector.connection.get_async_client()).close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("93.184.215.14", "2606:2800:21f:cb07::1", "::ffff:93.184.215.14")),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.1.1", "0.0.0.0")),
        *((address, False) for address in ("169.254.169.254", "100.64.0.1", "168.63.129.16", "224.0.0.1")),
        *((address, False) for address in ("::1", "::", "fe80::1%eth0", "fd00:ec2::254", "ff02::1")),
        *((address, False) for address in ("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::")),
    ],
)
def test_what_is_public(address: str, public: bool) -> None:
    assert media.is_public(address) is public


async def test_a_redirect_is_checked_as_well(images: LocalImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 counts as public here; it sends on to ::1, which does not."""
    monkeypatch.setattr(media, "is_public", lambda address: address.endswith("127.0.0.1"))
    assert (await fetch(connector(), f"http://127.0.0.1:{images.port}/a.png")).size == (40, 30)
    images.redirect = f"http://[::1]:{images.port}/secret"
    with pytest.raises(InvalidRequest, match="not public"):
        await fetch(connector(), f"http://127.0.0.1:{images.port}/b.png")
    assert images.hits == ["/a.png", "/b.png"]


async def test_listed_domains(images: LocalImages) -> None:
    """The operator's own images may lie on private addresses; then nothing else is fetched."""
    listed: dict[str, Any] = {"allowed_media_domains": ["localhost"]}
    assert (await fetch(connector(**listed), f"http://localhost:{images.port}/a.png")).size == (40, 30)
    with pytest.raises(ValueError, match="allowed domains"):
        await fetch(connector(**listed), f"http://127.0.0.1:{images.port}/b.png")
    images.redirect = f"http://127.0.0.1:{images.port}/secret"
    with pytest.raises(ValueError, match="Failed to load image"):
        await fetch(connector(**listed), f"http://localhost:{images.port}/c.png")
    assert images.hits == ["/a.png", "/c.png"]


async def test_what_cannot_be_fetched(images: LocalImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    listed: dict[str, Any] = {"allowed_media_domains": ["localhost"]}
    with pytest.raises(Unprocessable, match="could not be fetched"):
        await fetch(connector(**listed), "http://localhost:1/")
    for url in ("file:///etc/passwd", "gopher://localhost/", "data:image/png,abc"):
        with pytest.raises(ServeError) as refused:
            await fetch(connector(), url)
        assert refused.value.status == 400


def test_vllm_fetches_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "")  # put back after the test
    monkeypatch.delenv("VLLM_MEDIA_CONNECTOR")
    media.register_connector()
    connector = MEDIA_CONNECTOR_REGISTRY.load(vllm.envs.VLLM_MEDIA_CONNECTOR, media_io_kwargs=None)
    assert isinstance(connector, media.PublicMediaConnector)
