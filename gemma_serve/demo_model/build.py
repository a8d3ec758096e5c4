"""Writes the embedded model into this folder: `python -m gemma_serve.demo_model.build`.

The same bytes every time: seeds are fixed, and the random numbers are numpy's, since torch's differ between
processors. `chat_template.jinja` and `README.md` are written by hand and stay as they are.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_serve.demo_model import PATH
from gemma_serve.demo_model.corpus import documents

SEED: Final = 3
DOCUMENTS: Final = 20_000

# Ids 0 to 4 are Gemma's; the others sit close by because the vocabulary is small.
SPECIAL_TOKENS: Final = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
    "<start_function_declaration>", "<end_function_declaration>", "<start_function_call>",
    "<end_function_call>", "<start_function_response>", "<end_function_response>", "<escape>",
)  # fmt: skip
BYTE_TOKENS: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
BOS, EOS, END_OF_TURN = (SPECIAL_TOKENS.index(token) for token in ("<bos>", "<eos>", "<end_of_turn>"))
VOCAB_SIZE: Final = 3072
CONTEXT: Final = 8192

# In the form that Google publishes: transformers 4 and 5 and vLLM all read it.
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "dtype": "bfloat16",
    "eos_token_id": [EOS, END_OF_TURN],
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "max_position_embeddings": CONTEXT,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 64,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG: Final[dict[str, Any]] = {
    "bos_token_id": BOS,
    "do_sample": True,
    "eos_token_id": [EOS, END_OF_TURN],
    "pad_token_id": 0,
    "top_k": 64,
    "top_p": 0.95,
}
TOKENIZER_CONFIG: Final[dict[str, Any]] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "model_max_length": CONTEXT,
    "pad_token": "<pad>",
    "padding_side": "left",
    "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>",
}

# A piece is a word with the space before it, one digit, a run of other signs, or white space: no piece
# joins two of them, though Gemma's tokenizer, like this one, does not split its input when it is used.
PIECES: Final = r"▁?\p{L}+|\p{N}|▁?[^\p{L}\p{N}▁\n\t]+|▁+|\n+|\t+"


def _train_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces of BPE, most basic first, and the merges that make them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(BYTE_TOKENS),
        initial_alphabet=[chr(code) for code in range(ord("!"), ord("~") + 1)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(DOCUMENTS, SEED), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in trained["merges"]]
    return sorted(trained["vocab"], key=trained["vocab"].get), merges


def build_tokenizer() -> Tokenizer:
    """Gemma's kind: spaces are ▁, and what the pieces cannot spell falls back to bytes."""
    pieces, merges = _train_pieces()
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *BYTE_TOKENS, *pieces])}
    if len(vocab) != VOCAB_SIZE:
        raise ValueError(f"the corpus gave {len(vocab)} tokens where {VOCAB_SIZE} are wanted: make it richer")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _loudness(token: str) -> float:
    """How much a token is heard among the logits: noise reads best when it is made of whole words."""
    if token == "<end_of_turn>":
        return 1.0
    if token in SPECIAL_TOKENS or token in BYTE_TOKENS:
        return 0.05
    if token.startswith("▁") and token[1:].isalpha() and len(token) > 3:
        return 1.0
    return 0.7 if token.isalpha() else 0.5


def _embeddings(vocab: list[str], width: int, rng: np.random.Generator) -> np.ndarray:
    directions = rng.standard_normal((len(vocab), width), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Small: the embedding is also the output layer, so a loud token would only ever predict itself.
    return directions * np.array([[0.1 * _loudness(token)] for token in vocab], dtype=np.float32)


def _parameter(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A layer's weight. Gemma's norms scale by one more than what is stored."""
    if name == "model.norm.weight":
        return np.full(shape, 29.0, dtype=np.float32)  # logits that differ by about 3
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return np.full(shape, 1.0, dtype=np.float32)  # attention that picks: else every step looks alike
    if len(shape) == 1:
        return np.zeros(shape, dtype=np.float32)
    return rng.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[1])


def build_weights(vocab: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Random, and scaled so that greedy decoding wanders instead of repeating one token."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG))
    rng = np.random.default_rng(SEED)
    for name, parameter in model.named_parameters():
        if name == "model.embed_tokens.weight":
            values = _embeddings(vocab, parameter.shape[1], rng)
        else:
            values = _parameter(name, tuple(parameter.shape), rng)
        yield name, torch.from_numpy(values).to(torch.bfloat16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build(folder: Path) -> None:
    """Writes tokenizer, configuration and weights into `folder`."""
    tokenizer = build_tokenizer()
    vocab = tokenizer.get_vocab()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    weights = dict(build_weights(sorted(vocab, key=vocab.__getitem__)))
    # Not `save_file`, whose files only their owner may read.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    count = sum(weight.numel() for weight in weights.values())
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    print(f"{folder}: {len(vocab)} tokens, {count:,} parameters, {size:,} bytes")


if __name__ == "__main__":
    build(PATH)
