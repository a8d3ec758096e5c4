"""A vLLM executor without a model: every request gets a random token in every step.

It does so at once, or with NULL_STEP_MS in the environment at the pace of a model that takes so long.

vLLM's scheduler, block manager, tokenizer and the way between its processes stay what they are, so that
servers can be compared with nothing but themselves to slow them down. Any vLLM server takes it:

    vllm serve MODEL --distributed-executor-backend benchmarks.null_executor.NullExecutor
    gemma-server serve --set engine.distributed_executor_backend=benchmarks.null_executor.NullExecutor
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

_CACHE_BYTES = 8 << 30  # counted, not allocated
_FIRST_WORD = 300  # below are special tokens, and bytes that are not text


class NullExecutor(Executor):  # type: ignore[misc]
    def _init_executor(self) -> None:
        self._random = random.Random(0)
        self._seconds = float(os.environ.get("NULL_STEP_MS", "0")) / 1000
        self._prompts: dict[str, int] = {}
        self._tokens = range(_FIRST_WORD, self.model_config.get_vocab_size() - 1)
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=64, dtype=torch.float32
        )
        self._answers: dict[str, Any] = {
            "get_kv_cache_spec": {"layers.0": spec},
            "get_supported_kv_cache_layouts": ["NHD"],
            "determine_available_memory": _CACHE_BYTES,
            "get_supported_tasks": ("generate",),
            "compile_or_warm_up_model": CompilationTimes(0.0, 0.0),  # asked by vLLM 0.26
            "list_loras": set(),
        }

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        return [self._answers.get(str(method))]

    def compile_or_warm_up_model(self) -> None:
        pass

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        output = self._step(scheduler_output)
        if not non_block:
            return output
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(output)
        return future

    def check_health(self) -> None:
        pass

    def _step(self, work: SchedulerOutput) -> ModelRunnerOutput:
        if self._seconds and work.num_scheduled_tokens:
            time.sleep(self._seconds)
        for name in work.finished_req_ids:
            self._prompts.pop(name, None)
        done = {}
        for new in work.scheduled_new_reqs:
            self._prompts[new.req_id] = len(new.prompt_token_ids or ())
            done[new.req_id] = new.num_computed_tokens
        cached = work.scheduled_cached_reqs
        done |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = list(work.num_scheduled_tokens)
        sampled = [
            # Nothing comes of a step that has not reached the end of the prompt.
            [self._random.choice(self._tokens)]
            if done[name] + work.num_scheduled_tokens[name] >= self._prompts[name]
            else []
            for name in names
        ]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: number for number, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
