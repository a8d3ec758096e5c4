"""vLLM's request models, read so that a body full of faults costs no more than one with one fault.

pydantic collects the faults of every item of a list, in every branch of a union: 2,000 wrong items of the
`input` of /v1/responses are 122,001 faults and take a second, those that fit into a body take hours.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic_core import SchemaValidator


def validator(kind: Any) -> SchemaValidator:
    """Of a model or a union of models; as its own, but a list ends at its first fault."""
    # Built anew, or the models within would be read by the validators that they have already.
    return SchemaValidator(_failing_fast(TypeAdapter(kind).core_schema), _use_prebuilt=False)


def _failing_fast(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(map(_failing_fast, schema))
    if not isinstance(schema, dict):
        return schema
    copied = {name: _failing_fast(value) for name, value in schema.items()}
    if copied.get("type") in ("list", "tuple", "set"):
        copied["fail_fast"] = True
    return copied
