"""What all sections of the settings have in common, and how text becomes a value."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr


def text_value(text: str) -> Any:
    """What an environment variable or option says: JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _comma_list(value: Any) -> Any:
    """Environment variables hold lists as `a,b`, or as JSON."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return text_value(value)
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_comma_list)]
UpperCase = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
