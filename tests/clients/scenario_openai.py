"""What any OpenAI client must be able to do here, with the openai package. Runs in its own
environment."""

import os

import openai

URL, MODEL, ADAPTER = (os.environ[f"SCENARIO_{name}"] for name in ("URL", "MODEL", "ADAPTER"))
HI = [{"role": "user", "content": "Say hello."}]

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
create = client.chat.completions.create

base = create(model=MODEL, messages=HI, max_tokens=8, temperature=0)
assert base.choices[0].message.content
assert base.loriner["generation"] is None

adapted = create(
    model=MODEL, messages=HI, max_tokens=8, temperature=0, extra_body={"adapter": ADAPTER}
)
by_model = create(model=ADAPTER, messages=HI, max_tokens=8, temperature=0)
assert adapted.loriner["generation"]
assert adapted.choices[0].message.content == by_model.choices[0].message.content

chunks = list(
    create(
        model=ADAPTER,
        messages=HI,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
)
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == adapted.choices[0].message.content
assert chunks[-1].usage.completion_tokens > 0

completion = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, logprobs=1)
assert completion.choices[0].logprobs.tokens
assert {MODEL, ADAPTER} <= {model.id for model in client.models.list()}

for bad, kind in (
    ({"model": "no-such-model"}, openai.NotFoundError),
    ({"model": MODEL, "temperature": 9}, openai.BadRequestError),
    ({"model": MODEL, "extra_body": {"adapter": "no-such-adapter"}}, openai.NotFoundError),
):
    try:
        create(messages=HI, **bad)
    except kind:
        continue
    raise AssertionError(f"{bad} was not refused with {kind.__name__}")
