"""Text to token ids and back over HTTP, in vLLM's shape: /tokenize and /detokenize.

Runs nothing. The tokenizer is the base's; a conversation is rendered as the chat would be that
names the same adapter.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from loriner.api import body, prompts
from loriner.api.access import Right
from loriner.api.auth import GuardedRoute, Told
from loriner.api.inference import chat_tokens, check_names
from loriner.api.responses import json_response
from loriner.api.schema import DetokenizeBody, TokenizeBody
from loriner.api.shared import Shared


class TokenDoor:
    """Handlers and routes, at the root as vLLM has them and under /v1."""

    def __init__(self, shared: Shared) -> None:
        self._service = shared.service
        self._max_body_bytes = shared.config.max_body_bytes

    def routes(self) -> list[GuardedRoute]:
        return [
            GuardedRoute(
                prefix + path, endpoint, right=Right.INFER, methods=["POST"], told=Told(body=asked)
            )
            for prefix in ("", "/v1")
            for path, endpoint, asked in (
                ("/tokenize", self.tokenize, TokenizeBody),
                ("/detokenize", self.detokenize, DetokenizeBody),
            )
        ]

    async def tokenize(self, request: Request) -> Response:
        asked = await body.parse(request, TokenizeBody, self._max_body_bytes)
        chat, caller = asked.chat(), request.state.caller
        if chat is None:
            await check_names(self._service, asked, caller)
            special = asked.add_special_tokens is not False
            ids = await prompts.from_text(self._service, asked.prompt or "", special)
        else:
            ids = await chat_tokens(self._service, chat, caller)
        answer: dict[str, Any] = {"count": len(ids), "tokens": ids, "token_strs": None}
        if asked.return_token_strs:
            answer["token_strs"] = await asyncio.to_thread(self._service.chat.spellings, ids)
        answer["max_model_len"] = self._service.max_model_len
        return json_response(answer)

    async def detokenize(self, request: Request) -> Response:
        asked = await body.parse(request, DetokenizeBody, self._max_body_bytes)
        await check_names(self._service, asked, request.state.caller)
        prompts.check_ids(asked.tokens, "tokens", self._service.vocab_size)
        text = await asyncio.to_thread(self._service.decode, asked.tokens)
        return json_response({"prompt": text})
