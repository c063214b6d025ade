"""Text and chat messages -> token ids, by the base's own tokenizer.

Used on the doors' side of the process boundary. The template is the base's, or one that an adapter
brought, which is rendered in a process of its own (`templates.py`); callers bring none.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from loriner.engine.templates import Templates
from loriner.errors import InvalidRequestError


class ChatTokenizer:
    """Loads on first use (its library takes seconds to import), so start it beside the engine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._brought = Templates()
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, local_files_only=True)

    def warm(self) -> None:
        """Load now."""
        with self._lock:
            _ = self._tokenizer

    @property
    def template(self) -> str:
        """The text of the chat template; "" when there is none."""
        self.warm()
        try:
            return str(self._tokenizer.get_chat_template(tools=[]))
        except ValueError:
            return ""

    def own_template(self, template: str) -> str | None:
        """What an adapter brings, or None when it is the base's. Raises InvalidAdapterError when it
        does not compile."""
        if template.strip() == self.template.strip():
            return None
        self._brought.compile(template)
        return template

    def close(self) -> None:
        self._brought.close()

    def special_id(self, text: str) -> int | None:
        """The special token that is written `text`: not shown in answers."""
        found = self._added(text)
        return found[0] if found is not None and found[1] else None

    def unspelled_id(self, text: str) -> int | None:
        """The token that is written `text` and that no text in a grammar matches: llguidance keeps
        special tokens out of texts, and added ones in angle brackets."""
        found = self._added(text)
        bracketed = text.startswith("<") and text.endswith(">")
        return found[0] if found is not None and (found[1] or bracketed) else None

    def _added(self, text: str) -> tuple[int, bool] | None:
        """The id of the added token that is written `text`, and whether it is special."""
        self.warm()
        added = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        found = ((i, token.special) for i, token in added.items() if token.content == text)
        return next(found, None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.warm()
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        self.warm()
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def spellings(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary has it, its bytes in the tokenizer's own letters."""
        self.warm()
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: dict[str, Any],
        template: str | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """`template`: one that an adapter brought. `add_special_tokens`: beside those that it
        writes. Raises InvalidRequestError with its own words when it refuses the messages."""
        self.warm()
        asked = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **template_kwargs,
        }
        if template is None:
            text = self._by_base(messages, asked)
        else:
            asked = {**self._tokenizer.special_tokens_map, **asked}
            text = self._brought.render(template, messages, asked)
        return self.encode(text, add_special_tokens)

    def _by_base(self, messages: list[dict[str, Any]], asked: dict[str, Any]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **asked))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequestError(f"The chat template refused: {error}", "messages") from error
