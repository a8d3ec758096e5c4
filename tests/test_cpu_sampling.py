"""Sampling on a CPU leaves the tokens that vLLM leaves, and sorts few."""

from __future__ import annotations

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.sample.ops import topk_topp_sampler

from gemma_serve.engine import cpu_sampling

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on another device here")

VOCABULARY, REQUESTS = 3000, 24


def both(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ours(logits, k, p), cpu_sampling._vllms(logits.clone(), k.clone(), p.clone(), True)


def ours(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor) -> torch.Tensor:
    return cpu_sampling.apply_top_k_top_p(logits.clone(), k, p, True)


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
    left, theirs = both(logits, *limits(generator, *ks))
    assert torch.equal(left, theirs)


def tied(generator: torch.Generator, coarse: bool) -> torch.Tensor:
    """As many are equal as in bfloat16, or hundreds."""
    logits = torch.randn(REQUESTS, VOCABULARY, generator=generator) * 3
    return logits.round() if coarse else logits.bfloat16().float()


@pytest.mark.parametrize("coarse", [False, True])
def test_of_equal_ones_at_the_edge_all_are_left(coarse: bool) -> None:
    generator = torch.Generator().manual_seed(int(coarse))
    more = 0
    for _ in range(10):
        left, theirs = both(tied(generator, coarse), *limits(generator, 3, 40, 64))
        assert torch.all((left > -torch.inf) | (theirs == -torch.inf)), "one was lost"
        least = theirs.masked_fill(theirs == -torch.inf, torch.inf).amin(dim=-1, keepdim=True)
        extra = (left > -torch.inf) & (theirs == -torch.inf)
        assert torch.all((left == least) | ~extra)
        more += int(extra.sum())
    assert more, "no edge was among equal ones: this shows nothing"


@pytest.mark.parametrize("coarse", [False, True])
def test_the_others_in_the_batch_change_nothing(coarse: bool) -> None:
    """Or a seed would not give its answer again, as a request that is resumed needs."""
    generator = torch.Generator().manual_seed(2)
    logits = tied(generator, coarse)
    k, p = limits(generator, 64, 40, 200, 1025, VOCABULARY)
    together = ours(logits, k, p)
    for row in range(REQUESTS):
        alone = slice(row, row + 1)
        assert torch.equal(ours(logits[alone], k[alone], p[alone]), together[alone])
        if k[row] == VOCABULARY and p[row] < 1:
            assert torch.equal(ours(logits[alone], None, p[alone]), together[alone])


def test_fewer_are_allowed_than_top_k() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(REQUESTS, VOCABULARY, generator=generator)
    logits[:, 20:] = -torch.inf  # as a grammar does
    left, theirs = both(logits, *limits(generator, 3, 64))
    assert torch.equal(left, theirs)
    assert (left > -torch.inf).any(dim=-1).all()


def test_nothing_is_sorted_for_what_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the vocabulary was sorted")

    current_platform.import_kernels()
    monkeypatch.setattr(topk_topp_sampler, "apply_top_k_top_p_pytorch", never)
    cpu_sampling.sort_less()
    monkeypatch.setattr(torch.Tensor, "sort", never)
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
