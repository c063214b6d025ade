"""LlamaIndex's OpenAILike, as a completion model (its default) and as a chat model."""

import os

import openai
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

URL, MODEL, ADAPTER = (os.environ[f"SCENARIO_{name}"] for name in ("URL", "MODEL", "ADAPTER"))
SETTINGS = {
    "api_base": URL,
    "api_key": "none",
    "max_retries": 0,
    "max_tokens": 8,
    "temperature": 0.0,
}
MESSAGES = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hi")]

completion = OpenAILike(model=MODEL, **SETTINGS)
assert completion.complete("Hello").text
assert completion.chat(MESSAGES).message.content
assert "".join(piece.delta or "" for piece in completion.stream_complete("Hello"))

chat = OpenAILike(model=MODEL, is_chat_model=True, **SETTINGS)
answer = chat.chat(MESSAGES).message.content
assert answer
assert "".join(piece.delta or "" for piece in chat.stream_chat(MESSAGES)) == answer

by_body = OpenAILike(
    model=MODEL,
    is_chat_model=True,
    additional_kwargs={"extra_body": {"adapter": ADAPTER}},
    **SETTINGS,
)
by_model = OpenAILike(model=ADAPTER, is_chat_model=True, **SETTINGS)
assert by_body.chat(MESSAGES).message.content == by_model.chat(MESSAGES).message.content

try:
    OpenAILike(model="no-such-model", is_chat_model=True, **SETTINGS).chat(MESSAGES)
except openai.NotFoundError:
    pass
else:
    raise AssertionError("an unknown model was not refused")
