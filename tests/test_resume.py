"""Which way a request goes on after its engine has died, and how the guilty one is found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.outputs import LogprobsLists

from gemma_serve.engine.quarantine import CRASHED, KILLED, Quarantine
from gemma_serve.engine.resume import Diverged, Replay, Way, continued, way_of


def request(prompt: list[int] | None = None, **params: Any) -> EngineCoreRequest:
    sampling = SamplingParams(**{"max_tokens": 20, "output_kind": RequestOutputKind.DELTA, **params})
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3] if prompt is None else prompt,
        mm_features=None,
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def state(*tokens: int) -> Any:
    return SimpleNamespace(detokenizer=SimpleNamespace(output_token_ids=list(tokens)))


WHOLE = RequestOutputKind.FINAL_ONLY
JSON = StructuredOutputsParams(json_object=True)


@pytest.mark.parametrize(
    ("params", "way"),
    [
        ({"temperature": 0}, Way.CONTINUE),
        ({"temperature": 1}, Way.CONTINUE),
        ({"temperature": 0, "seed": 5}, Way.CONTINUE),
        ({"temperature": 0, "logprobs": 3, "stop": ["x"], "min_tokens": 4}, Way.CONTINUE),
        ({"temperature": 1, "repetition_penalty": 1.3, "logit_bias": {5: 1.0}, "top_k": 4}, Way.CONTINUE),
        ({"temperature": 1, "seed": 0}, Way.REPLAY),
        ({"temperature": 0, "presence_penalty": 0.5}, Way.REPLAY),
        ({"temperature": 0, "structured_outputs": JSON}, Way.REPLAY),
        ({"temperature": 0, "bad_words": ["x"]}, Way.REPLAY),
        ({"temperature": 1, "frequency_penalty": 0.5}, Way.IMPOSSIBLE),
        ({"temperature": 1, "structured_outputs": JSON}, Way.IMPOSSIBLE),
        ({"temperature": 1, "extra_args": {"whatever": 1}}, Way.IMPOSSIBLE),
        (
            {"temperature": 1, "frequency_penalty": 0.5, "output_kind": RequestOutputKind.FINAL_ONLY},
            Way.RESTART,
        ),
        ({"temperature": 1, "seed": 7, "output_kind": RequestOutputKind.FINAL_ONLY}, Way.RESTART),
    ],
)
def test_the_way(params: dict[str, Any], way: Way) -> None:
    assert way_of(request(**params), state(7, 8)) is way
    assert way_of(request(**params), state()) is Way.AGAIN


def test_what_the_engine_alone_has_cannot_go_on() -> None:
    with_image = request(temperature=0)
    with_image.mm_features = [SimpleNamespace(data=None)]
    assert way_of(with_image, state()) is Way.IMPOSSIBLE
    embedded = request(temperature=1)
    embedded.prompt_embeds = torch.zeros(3, 4)
    assert way_of(embedded, state(7)) is Way.IMPOSSIBLE


def test_continued_moves_tokens_to_the_prompt() -> None:
    first = request(temperature=0, max_tokens=20, min_tokens=5, prompt_logprobs=1)
    second = continued(first, state(7, 8))
    assert second.prompt_token_ids == [1, 2, 3, 7, 8]
    assert second.sampling_params is not None
    assert (second.sampling_params.max_tokens, second.sampling_params.min_tokens) == (18, 3)
    assert second.sampling_params.prompt_logprobs is None
    assert first.prompt_token_ids == [1, 2, 3]  # it may be needed again
    assert first.sampling_params is not None and first.sampling_params.max_tokens == 20


def output(*tokens: int, finish: FinishReason | None = None, logprobs: bool = False) -> EngineCoreOutput:
    lists = None
    if logprobs:
        rows = np.array(tokens).reshape(-1, 1)
        lists = LogprobsLists(rows, rows * 1.0, rows[:, 0])
    return EngineCoreOutput("r", list(tokens), new_logprobs=lists, finish_reason=finish)


def test_a_replay_gives_only_what_is_new() -> None:
    replay = Replay([5, 6, 7])
    assert replay.fresh(output(5)) is None
    fresh = replay.fresh(output(6, 7, 8, logprobs=True))  # as speculative decoding gives them
    assert fresh is not None
    assert fresh.new_token_ids == [8]
    assert fresh.new_logprobs is not None
    assert fresh.new_logprobs.logprob_token_ids.tolist() == [[8]]
    assert replay.done


@pytest.mark.parametrize("other", [output(6), output(5, 9), output(5, finish=FinishReason.STOP)])
def test_a_replay_that_differs_is_noticed(other: EngineCoreOutput) -> None:
    with pytest.raises(Diverged):
        Replay([5, 6, 7]).fresh(other)


def test_who_was_alone_at_two_crashes_is_guilty_and_so_is_its_like() -> None:
    quarantine = Quarantine()
    poison, others = request([6, 6, 6]), {f"o{number}": request([number]) for number in range(5)}
    assert quarantine.blame(others | {"p": poison}, CRASHED) is None
    assert quarantine.suspected("p") and quarantine.suspected("o1")
    assert quarantine.blame({"p": poison}, CRASHED) == "p"
    assert quarantine.refuses(request([6, 6, 6]))
    assert not quarantine.refuses(request([6, 6, 6], temperature=0.5))
    assert not any(quarantine.refuses(other) for other in others.values())


def test_a_crowd_is_never_guilty_and_being_killed_proves_little() -> None:
    quarantine = Quarantine()
    crowd = {"a": request([1]), "b": request([2])}
    for _ in range(10):
        assert quarantine.blame(crowd, CRASHED) is None
    quarantine.forget_all_but({"b"})
    assert not quarantine.suspected("a")
    alone = {"c": request([3])}
    assert quarantine.blame(alone, KILLED) is None
    assert not quarantine.suspected("c")
    assert quarantine.blame(alone, KILLED) is None
    assert quarantine.blame(alone, KILLED) is None
    assert quarantine.blame(alone, KILLED) == "c"
