"""A conversation of the corpus as the chat template writes it."""

from functools import cache

from transformers.utils.chat_template_utils import render_jinja_template

from . import PATH
from .corpus.chat import Chat


@cache
def _template() -> str:
    return (PATH / "chat_template.jinja").read_text(encoding="utf-8")


def render(chat: Chat) -> str:
    texts, _ = render_jinja_template(
        [chat.messages], chat.tools or None, chat_template=_template(), bos_token="<bos>"
    )
    return str(texts[0])
