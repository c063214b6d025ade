"""The QLoRA trainer: data in, adapters for exactly the base that serves out.

Knows files, models and the engine below it; no doors and no HTTP (`commands/` bring those).
"""
