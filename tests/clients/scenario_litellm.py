"""LiteLLM, which sends what it knows of OpenAI's fields and passes the rest on."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches one at import

import litellm

URL, MODEL, ADAPTER = (os.environ[f"SCENARIO_{name}"] for name in ("URL", "MODEL", "ADAPTER"))
HI = [{"role": "user", "content": "Say hello."}]
SETTINGS = {"api_base": URL, "api_key": "none", "max_tokens": 8, "temperature": 0, "max_retries": 0}


def ask(model: str, **fields: object):
    return litellm.completion(model=f"openai/{model}", messages=HI, **SETTINGS, **fields)


base = ask(MODEL)
assert base.choices[0].message.content
assert base.usage.completion_tokens > 0

adapted = ask(ADAPTER).choices[0].message.content
assert adapted
assert ask(MODEL, extra_body={"adapter": ADAPTER}).choices[0].message.content == adapted

chunks = list(ask(ADAPTER, stream=True, stream_options={"include_usage": True}))
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == adapted
assert any(getattr(chunk, "usage", None) for chunk in chunks)

text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="Hello", **SETTINGS)
assert text.choices[0].text

for bad, kind in (
    ({"model": "no-such-model"}, litellm.NotFoundError),
    ({"model": MODEL, "extra_body": {"adapter": "no-such-adapter"}}, litellm.NotFoundError),
    ({"model": MODEL, "top_p": 9}, litellm.BadRequestError),
):
    try:
        ask(**bad)
    except kind:
        continue
    raise AssertionError(f"{bad} was not refused with {kind.__name__}")
