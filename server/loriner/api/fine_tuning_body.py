"""What POST /v1/fine_tuning/jobs may hold. Knows limits and types; which settings `loriner` may
name is for `loriner train` to say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Key = Annotated[str, Field(max_length=64)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Setting = bool | int | Number | Annotated[str, Field(max_length=4096)]


class Strict(BaseModel):
    """Other fields are refused: each would change what is trained."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Hyperparameters(Strict):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(Strict):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Strict):
    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class CreateBody(Strict):
    """POST /v1/fine_tuning/jobs. `loriner` has settings of `loriner train` by their names."""

    model: Annotated[str, Field(max_length=256)]
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[str, Field(max_length=40)] | None = None
    seed: Seed | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    loriner: Annotated[dict[Key, Setting], Field(max_length=64)] = {}
