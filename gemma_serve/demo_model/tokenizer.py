"""The tokenizer: Gemma's kind, small, trained on the corpus."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any, Final

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

from . import corpus
from .render import render

SEED: Final = 3
CONVERSATIONS: Final = 30_000
CONTEXT: Final = 8192

# Ids 0 to 4 are Gemma's; the others sit close by because the vocabulary is small.
SPECIAL_TOKENS: Final = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
    "<start_function_declaration>", "<end_function_declaration>", "<start_function_call>",
    "<end_function_call>", "<start_function_response>", "<end_function_response>", "<escape>",
)  # fmt: skip
BYTE_TOKENS: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
BOS, EOS, END_OF_TURN = (SPECIAL_TOKENS.index(token) for token in ("<bos>", "<eos>", "<end_of_turn>"))
VOCAB_SIZE: Final = 3072

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
# A capitalised word stands without its space, so that a name is the same tokens in a sentence and in quotes:
# copying it is hard enough for so small a model.
PIECES: Final = r"▁?\p{Ll}\p{L}*|\p{L}+|\p{N}|▁?[^\p{L}\p{N}▁\n\t]+|▁+|\n+|\t+"


def _texts() -> Iterator[str]:
    """The corpus as the model reads it, cut at the special tokens."""
    rng = random.Random(SEED)
    for _ in range(CONVERSATIONS):
        yield from re.split("|".join(map(re.escape, SPECIAL_TOKENS)), render(corpus.conversation(rng)))
        if rng.random() < 0.02:
            yield corpus.text(rng)


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
    tokenizer.train_from_iterator(_texts(), trainer)
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
