"""How a request goes on when the engine that worked on it has died.

`AsyncLLM` in this process keeps what the client is owed: prompt, tokens so far, half-decoded characters,
text held back for stop strings, log probabilities. Lost is what the engine had computed, and whatever state
its sampler kept. What can be done without that state depends on the request; README's table says the same
in words.
"""

from __future__ import annotations

from copy import copy
from enum import Enum, auto

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

_GREEDY = 1e-5  # vLLM samples greedily below this temperature


class Way(Enum):
    """How to go on, best first."""

    AGAIN = auto()
    """As it was: the engine had given nothing yet."""
    CONTINUE = auto()
    """With the tokens so far as part of the prompt."""
    RESTART = auto()
    """From the start; the client has seen nothing of the first attempt."""
    REPLAY = auto()
    """From the start, dropping what the client has: the same tokens come again."""
    IMPOSSIBLE = auto()


def way_of(request: EngineCoreRequest, state: RequestState) -> Way:
    """The exact way to finish `request`, whose tokens so far are in `state`."""
    if any(feature.data is None for feature in request.mm_features or ()):
        return Way.IMPOSSIBLE  # the engine had the image in its cache, this process only its hash
    if not tokens_so_far(state):
        return Way.AGAIN
    params = request.sampling_params
    assert params is not None  # embeddings have no tokens
    if _prompt_continues(request, params):
        return Way.CONTINUE
    if params.output_kind is RequestOutputKind.FINAL_ONLY:
        return Way.RESTART
    return Way.REPLAY if params.temperature < _GREEDY or params.seed is not None else Way.IMPOSSIBLE


def tokens_so_far(state: RequestState) -> list[int]:
    return [] if state.detokenizer is None else state.detokenizer.output_token_ids


# What leaves the next token dependent on nothing but the tokens before it, wherever the prompt ends. Not so
# when the sampler keeps a state: a grammar, a count of the output alone. Parameters that nobody has thought
# of are not in the list, which is the safe side.
STATELESS = frozenset(
    {
        *("n", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty"),
        *("logit_bias", "allowed_token_ids"),
        *("stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "include_stop_str_in_output"),
        *("logprobs", "prompt_logprobs", "logprob_token_ids", "flat_logprobs"),
        *("prompt_logprob_token_ids", "prompt_logprob_start"),
        *("detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
        *("output_kind", "stream_interval", "output_text_buffer_length"),
        *("skip_clone", "skip_reading_prefix_cache", "_watermarking_skipped"),
        *("_eos_token_id", "_all_stop_token_ids"),
    }
)
_DEFAULTS = SamplingParams()


def _prompt_continues(request: EngineCoreRequest, params: SamplingParams) -> bool:
    if request.prompt_embeds is not None:
        return False
    if params.seed is not None and params.temperature >= _GREEDY:
        return False  # the generator has moved on from its seed
    return all(
        not (value := getattr(params, name)) or value == getattr(_DEFAULTS, name)
        for name in params.__struct_fields__
        if name not in STATELESS
    )


def continued(request: EngineCoreRequest, state: RequestState) -> EngineCoreRequest:
    """`request` with the tokens so far moved from the output to the prompt."""
    tokens = tokens_so_far(state)
    params = copy(request.sampling_params)
    assert params is not None and params.max_tokens is not None  # vLLM's input processor sets it
    params.max_tokens -= len(tokens)
    params.min_tokens = max(0, params.min_tokens - len(tokens))
    # These came with the first token.
    params.prompt_logprobs = params.prompt_logprob_token_ids = params.prompt_logprob_start = None
    request = copy(request)
    request.sampling_params = params
    request.prompt_token_ids = [*(request.prompt_token_ids or ()), *tokens]
    return request


def restart(request: EngineCoreRequest, state: RequestState, processor: OutputProcessor) -> None:
    """Forget the tokens so far; the client's queue stays."""
    processor.request_states[request.request_id] = RequestState.from_new_request(
        tokenizer=processor.tokenizer,
        request=request,
        prompt=state.prompt,
        parent_req=state.parent_req,
        request_index=state.request_index,
        queue=state.queue,
        log_stats=processor.log_stats,
        stream_interval=processor.stream_interval,
    )


class Replay:
    """Drops the tokens that come a second time."""

    def __init__(self, tokens: list[int]) -> None:
        self._expected = list(tokens)
        self.seen = 0

    @property
    def done(self) -> bool:
        return self.seen == len(self._expected)

    def fresh(self, output: EngineCoreOutput) -> EngineCoreOutput | None:
        """What of `output` is new; None for nothing. Raises `Diverged`."""
        new = output.new_token_ids
        count = min(len(new), len(self._expected) - self.seen)
        if new[:count] != self._expected[self.seen : self.seen + count]:
            raise Diverged
        self.seen += count
        if count == len(new):
            if output.finish_reason is not None:
                raise Diverged  # the first attempt had gone on from here
            return None
        if count:  # then these have come before, too
            output.new_prompt_logprobs_tensors = None
        output.new_token_ids = new[count:]
        if output.new_logprobs is not None:
            ids, logprobs, ranks, *_ = output.new_logprobs
            output.new_logprobs = type(output.new_logprobs)(ids[count:], logprobs[count:], ranks[count:])
        return output


class Diverged(Exception):
    """The second attempt gave other tokens than the client already has."""
