"""What a choice's text is made of, as the readers give it out and the formats write it down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call `index`."""

    index: int
    text: str


Piece = Content | Reasoning | Call | Arguments
