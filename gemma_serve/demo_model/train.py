"""Trains the embedded model on the CPU: `python -m gemma_serve.demo_model.train`, or `make demo-model`."""

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from . import PATH, corpus
from .muon import Muon
from .render import render
from .tokenizer import (
    BOS,
    CONTEXT,
    END_OF_TURN,
    EOS,
    TOKENIZER_CONFIG,
    VOCAB_SIZE,
    build_tokenizer,
)

SEED: Final = 3
PLAIN_STEPS: Final = 2_000
ROUGH_STEPS: Final = 400
"""Then chats with noise, at a lower rate: from the start it would slow the learning of everything else."""
ROUGH_RATE: Final = 0.3
STEP_TOKENS: Final = 3_072
BATCH_TOKENS: Final = 1_600
"""Of one forward pass: what stays in the processor's caches."""
WORKERS: Final = 2
MATRIX_RATE: Final = 0.02
OTHER_RATE: Final = 4e-3
CHECKPOINT: Final = Path(".cache/demo_model.pt")
CHECKPOINT_STEPS: Final = 50

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
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "max_position_embeddings": CONTEXT,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
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
    "temperature": 0.5,  # so small a model rambles at 1
    "top_k": 64,
    "top_p": 0.95,
}

Example = tuple[list[int], list[bool]]
"""Token ids, and which of them the model learns to write."""
Batch = tuple[torch.Tensor, torch.Tensor]


class Examples:
    """The corpus as token ids. Step n's examples depend on the seed and n only, so training can resume."""

    def __init__(self, tokenizer: Tokenizer, plain_steps: int = PLAIN_STEPS) -> None:
        self.tokenizer = tokenizer
        self.plain_steps = plain_steps
        self.answer_start = tokenizer.encode("<start_of_turn>model\n", add_special_tokens=False).ids

    def conversation(self, rng: random.Random, *, rough: bool = False) -> Example:
        text = render(corpus.conversation(rng, rough=rough))
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        learn, position, length = [False] * len(ids), 0, len(self.answer_start)
        while position < len(ids):
            if ids[position : position + length] == self.answer_start:
                end = ids.index(END_OF_TURN, position)
                learn[position + length : end + 1] = [True] * (end + 1 - position - length)
                position = end
            position += 1
        return ids, learn

    def text(self, rng: random.Random) -> Example:
        ids = [*self.tokenizer.encode(corpus.text(rng)).ids, EOS]
        return ids, [False] + [True] * (len(ids) - 1)

    def step(self, number: int) -> list[Batch]:
        """Batches of examples that are about as long as each other."""
        rng, rough = random.Random(f"{SEED} {number}"), number >= self.plain_steps
        examples: list[Example] = []
        while sum(len(ids) for ids, _ in examples) < STEP_TOKENS:
            text = rng.random() < 0.01
            examples.append(self.text(rng) if text else self.conversation(rng, rough=rough))
        return [_padded(batch) for batch in _batches(examples)]


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example[0]), reverse=True):
        if batch and len(batch[0][0]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _padded(batch: list[Example]) -> Batch:
    ids = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.long)
    learn = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, learned) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        learn[row, : len(tokens)] = torch.tensor(learned)
    return ids, learn


def _schedule(step: int, steps: int) -> float:
    """The share of the learning rate: up, level, and down to nothing in the last 60%."""
    return min((step + 1) / 40, 1.0, (steps - step) / (0.6 * steps))


def _rate(step: int, plain: int, rough: int) -> float:
    return _schedule(step, plain) if step < plain else ROUGH_RATE * _schedule(step - plain, rough)


class Trainer:
    """The model, its optimizers and how far they are."""

    def __init__(self, plain_steps: int, rough_steps: int) -> None:
        torch.manual_seed(SEED)
        self.model = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG | {"dtype": "float32"}))
        self.parameters = list(self.model.parameters())
        embedding = self.model.model.embed_tokens.weight
        matrices = [weight for weight in self.parameters if weight.ndim == 2 and weight is not embedding]
        others = [weight for weight in self.parameters if weight.ndim == 1 or weight is embedding]
        self.optimizers = {
            Muon(matrices, lr=MATRIX_RATE): MATRIX_RATE,
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0): OTHER_RATE,
        }
        self.done, self.plain_steps, self.rough_steps = 0, plain_steps, rough_steps
        # One thread for each batch, rather than several for each product: other programs may use these cores,
        # and a product would wait for its slowest part.
        self.pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))

    def _gradients(self, batch: Batch) -> tuple[float, tuple[torch.Tensor, ...]]:
        ids, learn = batch
        hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[learn[:, 1:]]
        logits = functional.linear(hidden, self.model.model.embed_tokens.weight)
        loss = functional.cross_entropy(logits, ids[:, 1:][learn[:, 1:]], reduction="sum")
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def step(self, batches: list[Batch]) -> float:
        """The loss of a token, in nats."""
        count = sum(int(learn[:, 1:].sum()) for _, learn in batches)
        total = 0.0
        for loss, gradients in self.pool.map(self._gradients, batches):
            total += loss
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.div_(count)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        share = _rate(self.done, self.plain_steps, self.rough_steps)
        for optimizer, rate in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        return total / count

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path)
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_model(model: Gemma3ForCausalLM, folder: Path) -> None:
    """Weights in bfloat16, and the configuration."""
    weights = {name: weight.detach().to(torch.bfloat16) for name, weight in model.named_parameters()}
    # Not `save_file`, whose files only their owner may read.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


def train(folder: Path, checkpoint: Path, plain_steps: int, rough_steps: int) -> None:
    """Goes on from the checkpoint, if there is one; writes the whole model to `folder`."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    steps = plain_steps + rough_steps
    examples, trainer = Examples(tokenizer, plain_steps), Trainer(plain_steps, rough_steps)
    if checkpoint.exists():
        trainer.resume(checkpoint)
        print(f"resuming {checkpoint} after step {trainer.done}")
    smooth = math.nan
    with tqdm(total=steps, initial=trainer.done, unit="step") as progress:
        while trainer.done < steps:
            loss = trainer.step(examples.step(trainer.done))
            smooth = loss if math.isnan(smooth) else 0.9 * smooth + 0.1 * loss
            progress.set_postfix(loss=f"{smooth:.4f}")
            progress.update()
            if trainer.done % CHECKPOINT_STEPS == 0 or trainer.done == steps:
                trainer.save(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)
    write_model(trainer.model, folder)
    count = sum(parameter.numel() for parameter in trainer.parameters)
    print(f"{folder}: {count:,} parameters, loss {smooth:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded model; resumes from its checkpoint.")
    parser.add_argument("--folder", type=Path, default=PATH, help="where the model goes")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: %(default)s")
    parser.add_argument("--plain-steps", type=int, default=PLAIN_STEPS, help="default: %(default)s")
    parser.add_argument("--rough-steps", type=int, default=ROUGH_STEPS, help="default: %(default)s")
    options = parser.parse_args()
    train(options.folder, options.checkpoint, options.plain_steps, options.rough_steps)


if __name__ == "__main__":
    main()
