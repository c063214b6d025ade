"""The eight questions every engine answers, as token ids, so that all read the same input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

QUESTIONS = (
    "What is the capital of Norway, and what is it known for?",
    "Write a short letter to my landlord: the heating has been off since Monday.",
    "Explain to a ten-year-old why the sky is blue and the sunset is red.",
    "Name three differences between a list and a tuple in Python, with one line of code for each.",
    "I have two hours in Lisbon between two trains. Suggest a walk with one place to eat, and say"
    " how long each part takes.",
    "Turn this into a polite e-mail: you are late again, the report was due on Friday, the client"
    " is angry, send me what you have today and tell me when the rest will be ready.",
    "A shop sells pens at 3 for 2 euros. Anna buys 12 pens and pays with a 20 euro note. How much"
    " change does she get? Show each step of the calculation.",
    "Summarise in two sentences: The council met on Tuesday to discuss the new bridge. Engineers"
    " presented three designs, the cheapest of which would close the road for eight months. Shop"
    " owners asked for a temporary crossing, and the mayor promised a decision before the end of"
    " the year.",
)


def token_ids(model: Path) -> list[list[int]]:
    """Each question through the chat template of the base in `model`."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids: list[list[int]] = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids
