"""Sampling on a CPU leaves the tokens that vLLM's leaves, and is what the engine uses."""

from __future__ import annotations

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.sample.ops import topk_topp_sampler

from gemma_serve.engine import cpu_sampling

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on another device here")

VOCABULARY, REQUESTS = 3000, 24


def both(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ours = cpu_sampling.apply_top_k_top_p(logits.clone(), k.clone(), p.clone(), True)
    return ours, topk_topp_sampler.apply_top_k_top_p_pytorch(logits.clone(), k.clone(), p.clone(), True)


def limits(generator: torch.Generator, *ks: int) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.tensor(ks)[torch.randint(len(ks), (REQUESTS,), generator=generator)].int()
    p = torch.rand(REQUESTS, generator=generator).clamp(0.01)
    p[::5] = 1.0
    return k, p


@pytest.mark.parametrize(
    "ks",
    [(64,), (1,), (1, 2, 40, 64, 1024), (64, VOCABULARY), (5, 1025, 2000), (VOCABULARY,)],
    ids=["Gemma's", "greedy", "small", "some without a limit", "large", "none"],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_logits_are_left(ks: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(REQUESTS, VOCABULARY, generator=generator) * (1 + 2 * seed)
    ours, theirs = both(logits, *limits(generator, *ks))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("digits", [0, 1])
def test_so_are_ties(digits: int) -> None:
    """Which of equal ones top_p leaves is up to the sorting; how many, and how likely, is not."""
    generator = torch.Generator().manual_seed(digits)
    for _ in range(10):
        logits = (torch.randn(REQUESTS, VOCABULARY, generator=generator) * 3).round(decimals=digits)
        ours, theirs = both(logits, *limits(generator, 3, 40, 64))
        assert torch.equal(ours.sort(dim=-1).values, theirs.sort(dim=-1).values)


def test_fewer_are_allowed_than_top_k() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(REQUESTS, VOCABULARY, generator=generator)
    logits[:, 20:] = -torch.inf  # as a grammar does
    ours, theirs = both(logits, *limits(generator, 3, 64))
    assert torch.equal(ours, theirs)
    assert (ours > -torch.inf).any(dim=-1).all()


def test_nothing_is_sorted_for_what_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the vocabulary was sorted")

    monkeypatch.setattr(cpu_sampling, "_sorted", never)
    monkeypatch.setattr(topk_topp_sampler, "apply_top_k_top_p_pytorch", never)
    cpu_sampling.sort_less()
    logits = torch.randn(REQUESTS, VOCABULARY)
    logits[0, 20:] = -torch.inf
    k = torch.full((REQUESTS,), 64, dtype=torch.int32)
    p = torch.full((REQUESTS,), 0.95)
    k[-1], p[-1] = VOCABULARY, 1.0
    left = topk_topp_sampler.apply_top_k_top_p(logits.clone(), k, p)
    assert torch.equal(left[-1], logits[-1])
    assert 1 <= (left[1] > -torch.inf).sum() <= 64
    sampled, _ = topk_topp_sampler.TopKTopPSampler().forward(logits.clone(), {}, k, p)
    assert torch.all(left.gather(1, sampled.unsqueeze(1)) > -torch.inf)
