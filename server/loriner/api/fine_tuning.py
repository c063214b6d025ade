"""OpenAI's files and fine-tuning endpoints over `TrainingFiles` and `TrainingJobs`.

Parses and shapes, decides nothing else. Needs the admin's right: a job publishes. Invariant: a
field that is accepted reaches `loriner train`, or is refused by name.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from loriner.adapters.names import DEFAULT_TENANT, parse_name
from loriner.api import body
from loriner.api.access import Right
from loriner.api.auth import NOTHING, GuardedRoute, Told
from loriner.api.fine_tuning_body import CreateBody, Hyperparameters, Setting
from loriner.api.fine_tuning_shapes import checkpoint_shapes, event_shapes, job_shape
from loriner.api.responses import json_response
from loriner.api.shared import Shared
from loriner.api.training_files import TrainingFiles
from loriner.api.training_job import JobState
from loriner.api.training_jobs import TrainingJobs
from loriner.errors import ConfigError, InvalidRequestError, ModelNotFoundError

LEARNING_RATE = 2e-4  # what learning_rate_multiplier multiplies
EPOCHS = 3  # where n_epochs is auto
SAVE_EVERY = 50  # steps
MAX_PAGE = 100
BYTES = "application/octet-stream"
# What the server decides.
OURS = frozenset(
    [
        "base",
        "device",
        "dtype",
        "num_threads",
        "memory_fraction",
        "duty",
        "name",
        "data",
        "eval_data",
        "out",
        "seed",
    ]
)
T = TypeVar("T")


class FineTuningDoor:
    """Handlers and routes; there are none when no training folder is configured."""

    def __init__(self, shared: Shared) -> None:
        self._service, self._config = shared.service, shared.config
        self._job_settings = shared.job_settings
        root = self._config.training
        self._files = TrainingFiles(root / "files") if root else None
        self._jobs = TrainingJobs(root / "jobs", shared) if root else None

    @property
    def files(self) -> TrainingFiles:
        assert self._files is not None
        return self._files

    @property
    def jobs(self) -> TrainingJobs:
        assert self._jobs is not None
        return self._jobs

    def routes(self) -> list[GuardedRoute]:
        if self._jobs is None:
            return []

        def route(
            method: str, path: str, endpoint: Callable[..., Any], told: Told = NOTHING
        ) -> GuardedRoute:
            admin = Right.ADMIN
            return GuardedRoute(f"/v1/{path}", endpoint, right=admin, methods=[method], told=told)

        job = "fine_tuning/jobs/{job_id}"
        return [
            route("POST", "files", self.add_file, Told(form=("file", "purpose"), files=("file",))),
            route("GET", "files", self.list_files),
            route("GET", "files/{file_id}", self.get_file),
            route("DELETE", "files/{file_id}", self.delete_file),
            route("GET", "files/{file_id}/content", self.read_file, Told(media=BYTES)),
            route("POST", "fine_tuning/jobs", self.create, Told(CreateBody)),
            route("GET", "fine_tuning/jobs", self.list_jobs),
            route("GET", job, self.get_job),
            route("POST", f"{job}/cancel", self.cancel),
            route("GET", f"{job}/events", self.list_events),
            route("GET", f"{job}/checkpoints", self.list_checkpoints),
        ]

    def start(self, url: str) -> None:
        """Go on with jobs that an earlier server left; `url` is our own."""
        if self._jobs is not None:
            self._jobs.start(url)

    async def stop(self) -> None:
        if self._jobs is not None:
            await self._jobs.stop()

    async def add_file(self, request: Request) -> Response:
        limit = self._config.max_upload_bytes
        body.check_length(request, limit)
        if "content-length" not in request.headers:
            raise InvalidRequestError("An upload needs a Content-Length header.")
        async with request.form(max_files=1, max_fields=4) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile) or not isinstance(purpose, str):
                raise InvalidRequestError("An upload has a file and a purpose.", "file")
            name = file.filename or ""
            made = await asyncio.to_thread(self.files.add, file.file, name, purpose, limit)
        return json_response(made)

    async def list_files(self, request: Request) -> Response:
        return json_response(_page(request, await asyncio.to_thread(self.files.list), _file_id))

    async def get_file(self, request: Request) -> Response:
        return json_response(self.files.get(request.path_params["file_id"]))

    async def read_file(self, request: Request) -> Response:
        path = self.files.path(request.path_params["file_id"])
        return FileResponse(path, media_type=BYTES)

    async def delete_file(self, request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await asyncio.to_thread(self.files.remove, file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def create(self, request: Request) -> Response:
        asked = await body.parse(request, CreateBody, self._config.max_body_bytes)
        if asked.model != self._service.model_name:
            raise ModelNotFoundError(asked.model)
        return json_response(job_shape(self.jobs.add(self._state(asked))))

    async def list_jobs(self, request: Request) -> Response:
        jobs = [job_shape(folder) for folder in await asyncio.to_thread(self.jobs.list)]
        return json_response(_page(request, jobs, _id))

    async def get_job(self, request: Request) -> Response:
        return json_response(job_shape(self.jobs.get(request.path_params["job_id"])))

    async def cancel(self, request: Request) -> Response:
        folder = self.jobs.get(request.path_params["job_id"])
        await self.jobs.cancel(folder)
        return json_response(job_shape(folder))

    async def list_events(self, request: Request) -> Response:
        folder = self.jobs.get(request.path_params["job_id"])
        events = await asyncio.to_thread(event_shapes, folder)
        return json_response(_page(request, events, _id))

    async def list_checkpoints(self, request: Request) -> Response:
        folder = self.jobs.get(request.path_params["job_id"])
        return json_response(_page(request, checkpoint_shapes(folder), _id))

    def _state(self, asked: CreateBody) -> JobState:
        job_id = f"ftjob-{uuid.uuid4().hex[:24]}"
        if asked.hyperparameters and asked.method:
            raise InvalidRequestError("method and hyperparameters exclude each other.", "method")
        chosen = asked.method.supervised.hyperparameters if asked.method else asked.hyperparameters
        hyper = chosen or Hyperparameters()
        name = f"{DEFAULT_TENANT}/{_slug(asked.suffix)}-{job_id[-8:]}"
        parse_name(name)
        seed = asked.seed if asked.seed is not None else 0
        return JobState(
            id=job_id,
            created_at=int(time.time()),
            model=asked.model,
            name=name,
            training_file=asked.training_file,
            validation_file=asked.validation_file,
            hyperparameters=hyper.model_dump(),
            settings=self._settings(asked, hyper, name, job_id, seed),
            seed=seed,
            suffix=asked.suffix,
            metadata=asked.metadata,
        )

    def _settings(
        self, asked: CreateBody, hyper: Hyperparameters, name: str, job_id: str, seed: int
    ) -> dict[str, Any]:
        """Of `loriner train`, by their names."""
        if taken := sorted(OURS & asked.loriner.keys()):
            raise InvalidRequestError(f"loriner.{taken[0]} is decided by the server.", "loriner")
        data = self.files.path(asked.training_file, "training_file")
        settings: dict[str, Any] = {"epochs": EPOCHS, **asked.loriner}
        if not asked.loriner.get("saves_per_epoch"):
            settings.setdefault("save_every", SAVE_EVERY)
        if hyper.n_epochs != "auto":
            settings["epochs"] = hyper.n_epochs
        if hyper.batch_size != "auto":
            settings["batch"] = hyper.batch_size
        if hyper.learning_rate_multiplier != "auto":
            settings["learning_rate"] = LEARNING_RATE * hyper.learning_rate_multiplier
        if asked.validation_file is not None:
            held = self.files.path(asked.validation_file, "validation_file")
            settings["eval_data"] = str(held.resolve())
        assert self._config.training is not None
        settings |= {
            "base": str(self._service.engine_config.model.resolve()),
            "device": self._config.training_device,
            "num_threads": self._config.training_threads or _half_the_cores(),
            "memory_fraction": self._config.training_memory_fraction,
            "duty": 1.0 if self._config.training_device == "cpu" else self._config.training_duty,
            "name": name,
            "data": str(data.resolve()),
            "out": str((self._config.training / "jobs" / job_id / "run").resolve()),
            "seed": seed,
        }
        self._check(asked.loriner, settings)
        return settings

    def _check(self, asked: Mapping[str, Setting], settings: Mapping[str, Any]) -> None:
        """What would only fail once the job has begun."""
        assert self._job_settings is not None
        names = self._job_settings.names
        if unknown := sorted(asked.keys() - names):
            known = ", ".join(sorted(names - OURS))
            raise InvalidRequestError(
                f"loriner.{unknown[0]} is not a setting of a job; there are {known}.", "loriner"
            )
        try:
            self._job_settings.check(settings)
        except ConfigError as error:
            raise InvalidRequestError(f"loriner: {error}", "loriner") from None


def _page(request: Request, entries: Sequence[T], id_of: Callable[[T], str]) -> dict[str, Any]:
    """OpenAI's cursor: `limit` entries after the one with the id `after`."""
    limit = request.query_params.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= MAX_PAGE):
        raise InvalidRequestError(f"limit must be a number from 1 to {MAX_PAGE}.", "limit")
    after, start = request.query_params.get("after"), 0
    if after:
        places = [i for i, entry in enumerate(entries) if id_of(entry) == after]
        if not places:
            raise InvalidRequestError("after names no entry of this list.", "after")
        start = places[0] + 1
    shown = entries[start : start + int(limit)]
    ids = [id_of(entry) for entry in shown]
    ends = {"first_id": ids[0], "last_id": ids[-1]} if ids else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(entries) > start + len(shown)}


def _id(entry: dict[str, Any]) -> str:
    return str(entry["id"])


def _file_id(entry: Any) -> str:
    return str(entry.id)


def _slug(suffix: str | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (suffix or "ft").lower()).strip("-") or "ft"


def _half_the_cores() -> int:
    return max(1, (os.cpu_count() or 2) // 2)
