"""The base of all bodies that a door accepts: strict types, other fields allowed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_NAME_CHARS = 256


class Body(BaseModel):
    """Errors never show what was sent."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)
