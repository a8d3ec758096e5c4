"""Will it fit? GPU memory of a model, by arithmetic alone, as vLLM divides it.

The blocks of the KV cache are exact (`vllm/v1/core/kv_cache_utils.py`, compared with the real engine by the
tests); what activations, CUDA graphs and CUDA itself take are estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.shape import Layer, Shape

GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GPU:
    """`memory` in bytes as the driver reports it, `bandwidth` in bytes per second as published."""

    memory: int
    bandwidth: float


GPUS = {
    "A10G": GPU(22_731 * _MIB, 600e9),
    "A100-40GB": GPU(40_960 * _MIB, 1_555e9),
    "A100": GPU(81_920 * _MIB, 2_039e9),
    "B200": GPU(183_359 * _MIB, 8_000e9),
    "H100": GPU(81_559 * _MIB, 3_350e9),
    "H200": GPU(143_771 * _MIB, 4_800e9),
    "L4": GPU(23_034 * _MIB, 300e9),
    "L40S": GPU(46_068 * _MIB, 864e9),
    "RTX-3090": GPU(24_576 * _MIB, 936e9),
    "RTX-4090": GPU(24_564 * _MIB, 1_008e9),
    "RTX-5090": GPU(32_607 * _MIB, 1_792e9),
    "RTX-6000-ADA": GPU(49_140 * _MIB, 960e9),
}

# Estimates, of each GPU.
_CUDA_BYTES = 600 * _MIB  # context, libraries' workspaces
_COMMUNICATION_BYTES = 700 * _MIB  # NCCL's and custom all-reduce's buffers, where there is more than one
_GRAPH_BYTES = 1 * GIB

_STEPS_IN_FLIGHT = 2  # vLLM prepares the next step while one runs; on the CPU it does not


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a table of blocks; a block holds the keys and values of `tokens` for all of them."""

    tokens: int
    window: int | None

    def blocks(self, length: int, in_flight: int = 1) -> int:
        """Most blocks of a chat of `length` tokens while `in_flight` of them are being computed."""
        if self.window is None:
            return math.ceil(length / self.tokens)
        # A window rarely starts where a block does: it touches one more.
        return math.ceil(min(self.window - 1 + in_flight, length) / self.tokens) + 1


@dataclass(frozen=True, slots=True)
class KVCache:
    """A pool of equal blocks; every group takes its blocks from it."""

    groups: tuple[Group, ...]
    bytes_per_block: int

    @classmethod
    def of(cls, layers: Sequence[Layer], gpus: int, value_bytes: int, block_size: int) -> KVCache:
        """What each of `gpus` GPUs holds; `block_size` in tokens is vLLM's, `value_bytes` of one number."""
        kinds = Counter(layers)

        def page(layer: Layer) -> int:
            return block_size * max(1, layer.kv_heads // gpus) * 2 * layer.head_size * value_bytes

        if len({layer.window for layer in kinds}) == 1:
            window = next(iter(kinds)).window
            return cls((Group(block_size, window),), sum(map(page, layers)))
        # As many layers in each group, so that a block is as large for all; the rarest kind says how many.
        fewest, most = min(kinds.values()), max(kinds.values())
        size = most if most < 1.5 * fewest else fewest
        largest = max(map(page, kinds))
        groups, width = [], 0
        for layer, count in kinds.items():
            number = math.ceil(count / size)
            width = max(width, math.ceil(count / number))
            # Smaller pages hold more tokens, where that comes out even.
            even = largest % page(layer) == 0
            tokens = block_size * (largest // page(layer) if even else 1)
            groups += [Group(tokens, layer.window)] * number
        return cls(tuple(groups), largest * width)

    def blocks(self, memory: float) -> int:
        """How many fit into `memory` bytes: what vLLM reports as `num_gpu_blocks`."""
        return int(memory // self.bytes_per_block)

    def blocks_of(self, length: int, in_flight: int = 1) -> int:
        """Of one chat."""
        return sum(group.blocks(length, in_flight) for group in self.groups)

    def bytes_of(self, length: int) -> int:
        """Of one chat that is being answered; what slid out of a window is free again."""
        return self.blocks_of(length) * self.bytes_per_block

    def bytes_per_token(self) -> float:
        """Of each further token of a chat that is longer than the windows, on each GPU."""
        return sum(self.bytes_per_block / group.tokens for group in self.groups if group.window is None)

    def chats(self, memory: float, length: int) -> int:
        """How many of `length` tokens are answered at once without one making room for another."""
        if memory <= 0:
            return 0
        usable = max(0, self.blocks(memory) - 1)  # one block is vLLM's own
        return usable // self.blocks_of(length)

    def concurrency(self, memory: float, max_length: int, in_flight: int) -> float:
        """What vLLM logs as "Maximum concurrency": as if every chat were in the midst of its prompt."""
        return self.blocks(memory) / self.blocks_of(max_length, in_flight)


@dataclass(frozen=True, slots=True)
class Options:
    """vLLM's arguments of these names."""

    gpu_memory_utilization: float = 0.9
    kv_cache_value_bytes: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes are of each GPU."""

    gpus: int
    weights: int
    reserve: int
    cache_memory: int
    cache: KVCache
    decode_limit: float
    """Tokens per second of one chat, if nothing but reading the weights that it needs took time."""

    @property
    def fits(self) -> bool:
        return self.cache_memory > 0

    def chats(self, length: int) -> int:
        return self.cache.chats(self.cache_memory, length)

    def serves(self, users: int, length: int, options: Options) -> bool:
        """Whether so many chats fit, and vLLM starts: it wants room for one in the midst of its prompt."""
        in_flight = _STEPS_IN_FLIGHT * options.max_num_batched_tokens
        one = self.cache.blocks_of(length, in_flight)
        return self.chats(length) >= users and self.cache.blocks(self.cache_memory) > one


def plan(shape: Shape, gpu: GPU, gpus: int, options: Options) -> Plan:
    """`gpus` is the tensor-parallel size."""
    weights = weight_bytes(shape, gpus)
    reserve = _reserve(shape, gpus, options)
    value_bytes = options.kv_cache_value_bytes or shape.activation_bytes
    return Plan(
        gpus=gpus,
        weights=weights,
        reserve=reserve,
        cache_memory=int(gpu.memory * options.gpu_memory_utilization) - weights - reserve,
        cache=KVCache.of(shape.layers, gpus, value_bytes, options.block_size),
        decode_limit=gpu.bandwidth / (weights * shape.step_parameters / shape.parameters),
    )


def plans(shape: Shape, gpu: GPU, options: Options, most: int = 8) -> Iterable[Plan]:
    """One for each tensor-parallel size that the model's heads can be divided by."""
    for gpus in (1, 2, 4, 8):
        if gpus <= most and divides(shape, gpus):
            yield plan(shape, gpu, gpus, options)


def divides(shape: Shape, gpus: int) -> bool:
    """vLLM wants whole heads on each GPU; a head of keys and values may stand on several."""
    kv_heads = shape.kv_heads
    return shape.heads % gpus == 0 and (kv_heads % gpus == 0 or gpus % kv_heads == 0)


def weight_bytes(shape: Shape, gpus: int) -> int:
    """Of each GPU: most weights are divided, norms are not, keys' and values' as far as there are heads."""
    kv_heads = shape.kv_heads
    shared = shape.parameters - shape.kv_parameters - shape.replicated_parameters
    kv = shape.kv_parameters * max(1, kv_heads // gpus) / kv_heads
    return math.ceil((shared / gpus + kv + shape.replicated_parameters) * shape.weight_bytes)


def _reserve(shape: Shape, gpus: int, options: Options) -> int:
    """What vLLM's profile run measures on the GPU, estimated."""
    width = 4 * shape.hidden_size + 3 * shape.intermediate_size / gpus
    activations = options.max_num_batched_tokens * width * shape.activation_bytes
    # Scores of the whole vocabulary: as the model gives them, as float32, and once more to sample from.
    logits = options.max_num_seqs * shape.vocabulary * (shape.activation_bytes + 4 + 4)
    communication = _COMMUNICATION_BYTES if gpus > 1 else 0
    return int(max(activations, logits) + _CUDA_BYTES + _GRAPH_BYTES + communication)
