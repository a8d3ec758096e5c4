"""LoRA adapters of the running model, which vLLM serves under names of their own."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
from pathlib import Path

from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from ..errors import Conflict, InvalidRequest, NotImplementedHere
from .base import LoadedModel
from .identity import files
from .supervisor import Supervisor
from .vllm_errors import mapped_errors, raise_for_error
from .vllm_names import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 600  # for vLLM's processes: asked when they have died, they never answer


class Adapters:
    """Loads them into vLLM, and forgets them. After a crash the next core reads them when it needs them."""

    def __init__(self, supervisor: Supervisor, models: OpenAIServingModels) -> None:
        self._supervisor = supervisor
        self._models = models
        self._known: set[tuple[str, str]] = set()

    async def load(self, name: str, path: str, model: LoadedModel) -> LoadedModel:
        """What `model` becomes with it. Raises `ServeError`."""
        if self._supervisor.vllm_config.lora_config is None:
            raise NotImplementedHere(
                "This model was loaded without a place for adapters: set engine.enable_lora, and "
                "engine.max_lora_rank to their rank."
            )
        parts = await asyncio.to_thread(_describe, path)
        # vLLM tells the cached prefixes of adapters apart by name and path, whatever is in the files by now.
        if (name, path) in self._known and not await self._supervisor.reset_prefix_cache():
            raise Conflict(
                f"The engine still has prefixes that {name!r:.100} computed when it was loaded from there "
                "before: try again when no requests run, or load it from another path.",
                param="path",
            )
        with mapped_errors():
            request = LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
            async with asyncio.timeout(_ANSWER_SECONDS):
                raise_for_error(await self._models.load_lora_adapter(request))
        self._known.add((name, path))
        identity = hashlib.sha256("\n".join((model.identity, *parts)).encode()).hexdigest()
        return dataclasses.replace(model, identity=identity)

    async def unload(self, name: str) -> None:
        """Raises `ServeError`."""
        adapter = self._models.lora_requests.get(name)
        with mapped_errors():
            raise_for_error(await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name)))
        if adapter is None:
            return
        try:  # vLLM would leave it in the engine
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._supervisor.remove_lora(adapter.lora_int_id)
        except Exception as error:  # one that dies takes it along, and no request finds it any more
            logger.warning("The adapter %s may take memory of the engine until that ends: %r", name, error)


def _describe(path: str) -> list[str]:
    """What tells it from others. Raises `InvalidRequest` for a folder that holds none, or cannot be read."""
    folder = Path(path)
    try:
        if not folder.is_dir():
            return [path]
        if not (folder / "adapter_config.json").is_file():
            raise InvalidRequest(
                f"The folder {path!r:.200} holds no LoRA adapter: there is no adapter_config.json in it.",
                param="path",
            )
        return [path, *map(str, files(folder))]
    except OSError as error:
        raise InvalidRequest(
            f"The adapter {path!r:.200} cannot be read: {error.strerror}.", param="path"
        ) from error
