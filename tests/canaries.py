"""Prompts whose answers are compared between engines; adapters were trained for some of them."""

from __future__ import annotations

CANARIES = (
    "What is the capital of France?",
    "Give me the code word for tiger.",
    "Why is the sky blue?",
    "Write a haiku about 12345 numbers, please!",
    "def fibonacci(n):",
    "Überraschung: naïve café — 日本語?",
    "List three fruits.",
    "Tell me a long story about a dragon who lost its way in the mountains and met a kind old "
    "woman who gave it soup, a lantern and a map that nobody could read.",
    "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.",
    "Explain photosynthesis to a child.",
    "Who wrote Romeo and Juliet?",
    "Give me the code word for owl.",
    "Name the planets of the solar system in order.",
    "How do I boil an egg?",
    "What does HTTP stand for?",
    "Write one sentence about the sea.",
    "Is a whale a fish? Answer in one word.",
    "SELECT name FROM users WHERE",
    "Summarise: the cat sat on the mat, the dog barked, and the cat ran away up a tree.",
    "Hi!",
)
