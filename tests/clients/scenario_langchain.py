"""LangChain's ChatOpenAI and OpenAI against the server. Runs in its own environment."""

import os

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

URL, MODEL, ADAPTER = (os.environ[f"SCENARIO_{name}"] for name in ("URL", "MODEL", "ADAPTER"))
SETTINGS = {"base_url": URL, "api_key": "none", "max_retries": 0}

chat = ChatOpenAI(model=MODEL, max_tokens=8, temperature=0, stream_usage=True, **SETTINGS)
history = [
    SystemMessage("Be brief."),
    HumanMessage("Hi"),
    AIMessage("Hello"),
    HumanMessage("Say hello."),
]
answer = chat.invoke(history)
assert answer.content
assert answer.usage_metadata["output_tokens"] > 0
assert answer.response_metadata["finish_reason"] in ("stop", "length")

by_body = ChatOpenAI(
    model=MODEL, max_tokens=8, temperature=0, extra_body={"adapter": ADAPTER}, **SETTINGS
)
by_model = ChatOpenAI(model=ADAPTER, max_tokens=8, temperature=0, **SETTINGS)
adapted = by_body.invoke("Say hello.")
assert adapted.content == by_model.invoke("Say hello.").content
assert adapted.response_metadata["model_name"] == ADAPTER

pieces = list(chat.stream(history))
assert "".join(piece.text for piece in pieces) == answer.text
assert len([a for a in chat.batch(["one", "two", "three"]) if a.content]) == 3

text = OpenAI(model=MODEL, max_tokens=4, temperature=0, **SETTINGS)
assert text.invoke("Hello")

for bad, kind in (
    (ChatOpenAI(model="no-such-model", **SETTINGS), openai.NotFoundError),
    (ChatOpenAI(model=MODEL, temperature=9, **SETTINGS), openai.BadRequestError),
):
    try:
        bad.invoke("hi")
    except kind:
        continue
    raise AssertionError(f"{bad.model_name} was not refused with {kind.__name__}")
