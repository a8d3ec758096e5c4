#!/usr/bin/env python3
"""Write the chart's README.md from README.head.md and the comments of values.yaml: `make chart-readme`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "gemma-serve"
HEAD = CHART.parent / "README.head.md"
README = CHART / "README.md"


def main() -> None:
    README.write_text(readme(), encoding="utf8")


def readme() -> str:
    rows = "\n".join(
        f"| `{name}` | `{yaml_text(default)}` | {meaning} |" for name, default, meaning in values()
    )
    head = HEAD.read_text(encoding="utf8")
    return f"{head}\n## Values\n\n| Value | Default | Meaning |\n|---|---|---|\n{rows}\n"


def values() -> Iterator[tuple[str, Any, str]]:
    """(name, default, meaning) of each value that has a `# -- ` comment."""
    text = (CHART / "values.yaml").read_text(encoding="utf8")
    defaults = yaml.safe_load(text)
    path: list[str] = []
    comment = ""
    for line in text.splitlines():
        if comment and (more := re.match(r" *# (?!--)(.*)", line)):
            comment += f" {more[1]}"
        elif found := re.match(r" *# -- (.*)", line):
            comment = found[1]
        elif key := re.match(r"( *)([A-Za-z]+):", line):
            path[len(key[1]) // 2 :] = [key[2]]
            if comment:
                default = defaults
                for part in path:
                    default = default[part]
                yield ".".join(path), default, comment
            comment = ""


def yaml_text(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip().replace("|", "\\|")


if __name__ == "__main__":
    main()
