"""A request that kills the engine is found and refused; all others come to their end."""

from __future__ import annotations

import asyncio
import signal

import openai
import psutil
import pytest

from ..conftest import start_server, until
from ..processes import below

# On the CPU a seeded request whose prompt is prefilled in chunks kills vLLM 0.32's engine, so chunks are off
# there unless the operator wants them.
CHUNKED = ("--set", "engine.enable_chunked_prefill=true", "--set", "engine.max_num_batched_tokens=512")
LONG = "word " * 1500


async def test_poison() -> None:
    server = start_server("--config", "demo", *CHUNKED)
    try:
        await asyncio.to_thread(server.wait_ready)
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        tokens = 0

        async def innocent(number: int) -> str:
            nonlocal tokens
            stream = await client.chat.completions.create(
                model="gemma-demo",
                messages=[{"role": "user", "content": f"Count to {number}"}],
                max_tokens=120,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            text = ""
            async for chunk in stream:
                tokens += 1
                text += chunk.choices[0].delta.content or ""
            return text

        async def poison() -> None:
            await client.chat.completions.create(
                model="gemma-demo", messages=[{"role": "user", "content": LONG}], max_tokens=5, seed=1
            )

        undisturbed = await asyncio.gather(*map(innocent, range(24)))
        tokens = 0
        running = asyncio.gather(*map(innocent, range(24)))
        await until(lambda: tokens > 200, 120)
        with pytest.raises(openai.InternalServerError) as crash:
            await poison()
        assert crash.value.status_code == 500
        assert crash.value.code == "engine_crash"
        assert list(await running) == list(undisturbed)
        restarts = server.text.count("gemma-demo: restarting")
        assert restarts == 2
        with pytest.raises(openai.InternalServerError) as again:
            await poison()
        assert again.value.code == "engine_crash"
        assert await innocent(3) == undisturbed[3]
        assert server.text.count("gemma-demo: restarting") == restarts
        await client.close()
        # Two engines have said that they die: neither is listened to any more.
        used, seconds = psutil.Process(server.process.pid).cpu_times, 2.0
        before = sum(used()[:2])
        await asyncio.sleep(seconds)
        assert sum(used()[:2]) - before < seconds / 2, "it spins"
        # An engine that does not hear SIGTERM is no reason to stay.
        (engine,) = below(server.process.pid, "EngineCore")
        engine.send_signal(signal.SIGSTOP)
        assert await asyncio.to_thread(server.end) == 0
    finally:
        server.end()
