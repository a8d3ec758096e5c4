"""Chat templates that leave no garbage."""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TidyTemplate(jinja2.Template):
    """Breaks the reference cycles of a rendering: its macros know the variables, which know the macros."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        context = self.new_context(dict(*args, **kwargs))
        try:
            return self.environment.concat(self.root_render_func(context))
        except Exception:
            self.environment.handle_exception()
        finally:
            for value in context.vars.values():
                if isinstance(value, Macro):
                    vars(value).clear()
            context.vars.clear()


def tidy_templates() -> None:
    """To be called before one is compiled; transformers does that in this environment."""
    ImmutableSandboxedEnvironment.template_class = TidyTemplate
