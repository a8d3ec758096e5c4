"""Images, audio and video that a message points at: fetched from public addresses only.

As vLLM's media connector, through which all its routes fetch. vLLM's own goes wherever a client points it: to
the cloud's metadata service, to the operator's other servers (server-side request forgery).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

import aiohttp
from PIL import Image
from vllm.connections import HTTPConnection
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from ..errors import InvalidRequest, ServeError, Unprocessable
from .vllm_names import VLLMUnprocessableEntityError

_AZURE_HOST = ipaddress.ip_address("168.63.129.16")  # answers every virtual machine, from a public address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast and ip != _AZURE_HOST


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket for an address that is about to be connected to.

    The last step before the connection: neither the way an address is written, nor a name that resolves anew,
    nor a redirect gets past it.
    """
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise _refused("it leads to an address that is not public")
    return socket.socket(family, kind, protocol)


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"A URL in the messages is refused: {reason}.", param="messages")


class _Connection(HTTPConnection):  # type: ignore[misc]
    """`anywhere` for domains that the operator lists; then no redirect, which may leave them, is followed."""

    _async_client: aiohttp.ClientSession | None

    def __init__(self, *, anywhere: bool) -> None:
        super().__init__()
        self._anywhere = anywhere

    async def get_async_client(self) -> aiohttp.ClientSession:
        if self._async_client is None or self._async_client.closed:
            factory = None if self._anywhere else _public_socket
            # Not through a proxy of the environment: it would resolve names out of our sight.
            self._async_client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(socket_factory=factory), trust_env=False
            )
        return self._async_client

    def get_sync_client(self) -> Any:
        raise NotImplementedError("media are fetched on the event loop only")

    async def get_async_response(self, url: str, *, allow_redirects: bool = True, **options: Any) -> Any:
        follow = allow_redirects and not self._anywhere
        return await super().get_async_response(url, allow_redirects=follow, **options)


_public, _listed = _Connection(anywhere=False), _Connection(anywhere=True)


class PublicMediaConnector(MediaConnector):  # type: ignore[misc]
    """vLLM's connector, but for where it connects and how it fails."""

    def __init__(self, *args: Any, allowed_media_domains: list[str] | None = None, **options: Any) -> None:
        super().__init__(*args, allowed_media_domains=allowed_media_domains, **options)
        self.connection = _listed if allowed_media_domains else _public

    async def load_from_url_async(self, url: str, *args: Any, **options: Any) -> Any:
        scheme = url.partition(":")[0].lower()
        if scheme not in ("data", "http", "https", "file"):
            raise _refused("send https:, http: or data:")
        if scheme == "file" and self.allowed_local_media_path is None:
            raise _refused("files of the server are not read")
        try:
            return await super().load_from_url_async(url, *args, **options)
        except ServeError:
            raise
        except NotImplementedError as error:
            raise _refused("a data: URL must be base64") from error
        except VLLMUnprocessableEntityError as error:
            if isinstance(error.__cause__, aiohttp.InvalidURL):
                raise _refused("it is not a valid one") from error
            raise
        except Image.DecompressionBombError as error:
            raise InvalidRequest(str(error), param="messages") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unprocessable(
                f"A URL in the messages could not be fetched ({type(error).__name__}).", param="messages"
            ) from error


def register_connector() -> None:
    """Have vLLM fetch through ours, unless the operator's environment names another."""
    MEDIA_CONNECTOR_REGISTRY.register("public")(PublicMediaConnector)
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "public")
