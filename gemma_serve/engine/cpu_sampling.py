"""Sampling on a CPU without sorting the vocabulary.

vLLM sorts all logits of a batch as soon as one request has a top_p, and Gemma's own defaults, top_k=64 and
top_p=0.95, ask for that: 24 ms a token of Gemma's 262,144, most of a step. Here only what top_k leaves is
sorted, 0.5 ms. The same tokens stay, but for one thing: of equally likely ones at the edge of top_p, as there
are many in bfloat16, vLLM keeps those that its sort happens to have there, this all, as both do for top_k.
What stays for a request depends on nothing else in the batch, or its seed would not give its answer again.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.ops import topk_topp_sampler

_MOST = 1024
"""For a larger top_k all is sorted."""
_TIES = 64
"""As for more that are as likely as the last of the top_k."""

_vllms = topk_topp_sampler.apply_top_k_top_p_pytorch


def sort_less() -> None:
    """In this process, for all that vLLM samples from now on."""
    topk_topp_sampler.apply_top_k_top_p_pytorch = apply_top_k_top_p


def apply_top_k_top_p(
    logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None, allow_cpu_sync: bool = False
) -> torch.Tensor:
    """What neither leaves is -inf; `logits`, requests by vocabulary, may be changed.

    `k` and `p` have a value for each request: the vocabulary's size and 1.0 where it has no limit.
    """
    if p is None:
        left: torch.Tensor = _vllms(logits, k, p, allow_cpu_sync)  # which does not sort then
        return left
    vocabulary = logits.shape[1]
    k = torch.full(p.shape, vocabulary) if k is None else k.long()
    few = k <= _MOST
    if few.all():
        return _limited(logits, k, p, int(k.max()) + _TIES)
    if few.any():
        logits[few] = _limited(logits[few], k[few], p[few], int(k[few].max()) + _TIES)
    many = ~few & ((k < vocabulary) | (p < 1.0))
    if many.any():
        logits[many] = _limited(logits[many], k[many], p[many], vocabulary)
    return logits


def _limited(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor, size: int) -> torch.Tensor:
    """Looks at the `size` largest."""
    whole = size >= logits.shape[1]
    largest, places = logits.sort(dim=-1) if whole else (part.flip(-1) for part in logits.topk(size, dim=-1))
    last = largest.gather(1, largest.shape[1] - k.unsqueeze(1))
    if not whole:
        # There may be more like the last. (Where it is -inf a grammar has left fewer than top_k.)
        more = ((largest[:, :1] >= last) & (last > -torch.inf)).squeeze(1)
        if more.any():
            rest = ~more
            logits[more] = _limited(logits[more], k[more], p[more], logits.shape[1])
            if rest.any():
                logits[rest] = _limited(logits[rest], k[rest], p[rest], size)
            return logits
    largest.masked_fill_(largest < last, -torch.inf)
    sums = largest.softmax(dim=-1).cumsum(dim=-1)
    unlikely = (sums <= 1 - p.unsqueeze(1)) & (p < 1.0).unsqueeze(1)
    unlikely[:, -1] = False
    least = largest.masked_fill(unlikely, torch.inf).amin(dim=-1, keepdim=True)
    largest.masked_fill_(largest < least, -torch.inf)
    return logits.fill_(-torch.inf).scatter_(1, places, largest)
