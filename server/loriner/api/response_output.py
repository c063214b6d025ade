"""Pieces of what one choice says -> the items of a response's `output`, and the events that tell
of them as they grow.

Pure. One item is open at a time. Invariant: the deltas of an item add up to its last event, and
every item is the same whether anybody reads the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from loriner.api import response_shapes as shapes
from loriner.api.tool_reader import Arguments, Call, Content, Piece


class Output:
    """Of one response; `stem` is what its items' ids end in."""

    def __init__(self, stem: str) -> None:
        self.items: list[shapes.MessageItem | shapes.CallItem] = []
        self._stem = stem
        self._open: shapes.MessageItem | shapes.CallItem | None = None
        self._num_events = 0

    def number(self) -> int:
        """The sequence number of the next event."""
        self._num_events += 1
        return self._num_events - 1

    def add(self, pieces: Sequence[Piece]) -> list[shapes.Event]:
        """The events that these pieces are."""
        events: list[shapes.Event] = []
        for piece in pieces:
            if isinstance(piece, Content):
                self._say(events, piece.text)
            elif isinstance(piece, Call):
                self._close(events)
                self._begin(events, shapes.CallItem(self._id("fc"), piece.call_id, piece.name))
            else:
                self._write(events, piece)
        return events

    def end(self, status: str) -> list[shapes.Event]:
        """The last events; what is open ends as `status`. A response has an item at least."""
        events: list[shapes.Event] = []
        if not self.items:
            self._say(events, "")
        self._close(events, status)
        return events

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._stem}{len(self.items)}"

    @property
    def _place(self) -> int:
        return len(self.items) - 1

    def _begin(
        self, events: list[shapes.Event], item: shapes.MessageItem | shapes.CallItem
    ) -> None:
        self.items.append(item)
        self._open = item
        events.append(self._told("added", item))

    def _say(self, events: list[shapes.Event], text: str) -> None:
        item = self._open
        if not isinstance(item, shapes.MessageItem):
            self._close(events)
            item = shapes.MessageItem(self._id("msg"), [])
            self._begin(events, item)
            item.content.append(shapes.OutputText(""))
            events.append(self._part("added", item))
        if text:
            item.content[0].text += text
            events.append(shapes.TextDelta(self.number(), item.id, self._place, 0, text))

    def _write(self, events: list[shapes.Event], piece: Arguments) -> None:
        item = self._open
        assert isinstance(item, shapes.CallItem)
        item.arguments += piece.text
        events.append(shapes.ArgumentsDelta(self.number(), item.id, self._place, piece.text))

    def _close(self, events: list[shapes.Event], status: str = "completed") -> None:
        item, self._open = self._open, None
        if item is None:
            return
        if isinstance(item, shapes.MessageItem):
            text = item.content[0].text
            events.append(shapes.TextDone(self.number(), item.id, self._place, 0, text))
            events.append(self._part("done", item))
        else:
            events.append(
                shapes.ArgumentsDone(self.number(), item.id, self._place, item.name, item.arguments)
            )
        item.status = status
        events.append(self._told("done", item))

    def _told(self, what: str, item: shapes.MessageItem | shapes.CallItem) -> shapes.ItemEvent:
        """A copy: the item goes on growing."""
        seen = copy(item)
        if isinstance(seen, shapes.MessageItem):
            seen.content = list(seen.content)
        return shapes.ItemEvent(f"response.output_item.{what}", self.number(), self._place, seen)

    def _part(self, what: str, item: shapes.MessageItem) -> shapes.PartEvent:
        kind = f"response.content_part.{what}"
        part = copy(item.content[0])
        return shapes.PartEvent(kind, self.number(), item.id, self._place, 0, part)
