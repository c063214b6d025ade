"""Pieces of what one choice says -> the items of a response's `output`, and the events that tell
of them as they grow.

Pure. One item is open at a time. Invariant: the deltas of an item add up to its last event, and
every item is the same whether anybody reads the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from loriner.api import response_shapes as shapes
from loriner.api.pieces import Arguments, Call, Content, Piece, Reasoning
from loriner.api.response_shapes import CallItem, Event, Item, MessageItem, ReasoningItem


class Output:
    """Of one response; `stem` is what its items' ids end in."""

    def __init__(self, stem: str) -> None:
        self.items: list[Item] = []
        self._stem = stem
        self._open: Item | None = None
        self._num_events = 0

    def number(self) -> int:
        """The sequence number of the next event."""
        self._num_events += 1
        return self._num_events - 1

    def add(self, pieces: Sequence[Piece]) -> list[Event]:
        """The events that these pieces are."""
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, Content):
                self._say(events, piece.text)
            elif isinstance(piece, Reasoning):
                self._think(events, piece.text)
            elif isinstance(piece, Call):
                self._close(events)
                self._begin(events, CallItem(self._id("fc"), piece.call_id, piece.name))
            else:
                self._write(events, piece)
        return events

    def end(self, status: str) -> list[Event]:
        """The last events; what is open ends as `status`. A response has an item at least."""
        events: list[Event] = []
        if not self.items:
            self._say(events, "")
        self._close(events, status)
        return events

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._stem}{len(self.items)}"

    @property
    def _place(self) -> int:
        return len(self.items) - 1

    def _begin(self, events: list[Event], item: Item) -> None:
        self.items.append(item)
        self._open = item
        events.append(self._told("added", item))

    def _say(self, events: list[Event], text: str) -> None:
        item = self._open
        if not isinstance(item, MessageItem):
            self._close(events)
            item = MessageItem(self._id("msg"), [])
            self._begin(events, item)
            item.content.append(shapes.OutputText(""))
            events.append(self._part("added", item))
        self._grow(events, item, text)

    def _think(self, events: list[Event], text: str) -> None:
        item = self._open
        if not isinstance(item, ReasoningItem):
            self._close(events)
            item = ReasoningItem(self._id("rs"), [])
            self._begin(events, item)
            item.content.append(shapes.ReasoningText(""))
            events.append(self._part("added", item))
        self._grow(events, item, text)

    def _grow(self, events: list[Event], item: MessageItem | ReasoningItem, text: str) -> None:
        if text:
            item.content[0].text += text
            kind = f"response.{item.content[0].type}.delta"
            events.append(shapes.TextDelta(kind, self.number(), item.id, self._place, 0, text))

    def _write(self, events: list[Event], piece: Arguments) -> None:
        item = self._open
        assert isinstance(item, CallItem), "arguments come after their call"
        item.arguments += piece.text
        events.append(shapes.ArgumentsDelta(self.number(), item.id, self._place, piece.text))

    def _close(self, events: list[Event], status: str = "completed") -> None:
        item, self._open = self._open, None
        if item is None:
            return
        number, place = self.number(), self._place
        if isinstance(item, CallItem):
            done = shapes.ArgumentsDone(number, item.id, place, item.name, item.arguments)
            events.append(done)
        else:
            kind, text = f"response.{item.content[0].type}.done", item.content[0].text
            events.append(shapes.TextDone(kind, number, item.id, place, 0, text))
            events.append(self._part("done", item))
        item.status = status
        events.append(self._told("done", item))

    def _told(self, what: str, item: Item) -> shapes.ItemEvent:
        """Of a copy: the item goes on growing."""
        seen = copy(item)
        if not isinstance(seen, CallItem):
            seen.content = list(seen.content)  # type: ignore[assignment]
        return shapes.ItemEvent(f"response.output_item.{what}", self.number(), self._place, seen)

    def _part(self, what: str, item: MessageItem | ReasoningItem) -> shapes.PartEvent:
        kind, part = f"response.content_part.{what}", copy(item.content[0])
        return shapes.PartEvent(kind, self.number(), item.id, self._place, 0, part)
