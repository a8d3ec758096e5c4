"""A model folder with the shape of a published Gemma and no weights: for its true speed and memory.

    python benchmarks/synthetic_model.py gemma-3-4b /tmp/gemma-3-4b
    gemma-server serve --model /tmp/gemma-3-4b --set engine.load_format=dummy

Text only: the shape is the text model's. vLLM fills it with random numbers; what it writes is noise. The
tokenizer is the embedded model's with tokens added up to the whole vocabulary, so that every id is a text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from gemma_serve import demo_model
from gemma_serve.engine.published import PUBLISHED, published, text_only


def make(name: str, folder: Path) -> Path:
    """Writes config, tokenizer and chat template of `name` into `folder`, which need not exist."""
    config = published(name)
    if config is None:
        raise ValueError(f"{name}: one of {', '.join(PUBLISHED)}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0} | text_only(config)
    _write(folder / "config.json", content)
    _write(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0})
    _write(folder / "tokenizer.json", _tokenizer(int(content["vocab_size"])))
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model.PATH / file, folder / file)
    return folder


def _tokenizer(size: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((demo_model.PATH / "tokenizer.json").read_text(encoding="utf8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    taken = set(vocabulary.values()) | {token["id"] for token in content["added_tokens"]}
    # No merge makes them, so no text is encoded as one; as an answer each is a word.
    vocabulary |= {f"▁word{number}": number for number in range(size) if number not in taken}
    return content


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(PUBLISHED))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make(options.name, options.folder)


if __name__ == "__main__":
    main()
