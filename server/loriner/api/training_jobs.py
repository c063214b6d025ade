"""Training jobs and their processes: queue, start, watch, cancel, and go on after a restart.

Each runs `loriner train` as a process of its own, at a low priority, and publishes through the
server's own door, canaries and all. Knows no HTTP. Invariant: a job that is not ended has a
process, waits for one, or gets one when the server starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from loriner.adapters.intake import is_kept
from loriner.api.training_job import (
    CANCELLED,
    ENDED,
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    JobFolder,
    JobState,
)
from loriner.errors import InvalidRequestError, LorinerError, ObjectNotFoundError

if TYPE_CHECKING:
    from loriner.api.shared import Shared

STOP_S = 30.0  # from asking a process to save to ending it
NICENESS = 10
INTERRUPTED = 130
_PREFIX = "ftjob-"

logger = logging.getLogger("loriner.training")


class TrainingJobs:
    """The jobs in one folder. `start` and `stop` frame the server's life."""

    def __init__(self, root: Path, shared: Shared) -> None:
        self._root, self._service = root, shared.service
        self._key = shared.access.own_key
        self._slots = asyncio.Semaphore(shared.config.max_training_jobs)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._url = ""  # of our own door
        self._ready = asyncio.Event()  # it can be published to
        self._stopping = False

    def start(self, url: str) -> None:
        """Run what waits, and what an earlier server left; `url` is where we are reached."""
        self._url = url
        for folder in self.list():
            if folder.state.status not in ENDED and folder.path.name not in self._tasks:
                self._enqueue(folder)
        self._ready.set()

    async def stop(self) -> None:
        """Let running jobs save; they go on when the server starts again."""
        self._stopping = True
        for process in self._processes.values():
            _signal(process, signal.SIGINT)
        for name, task in list(self._tasks.items()):
            if name not in self._processes:
                task.cancel()  # it waits; on disk it is queued
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=STOP_S)
        for process in self._processes.values():
            _signal(process, signal.SIGKILL)

    def add(self, state: JobState) -> JobFolder:
        folder = JobFolder(self._root / state.id)
        folder.create(state)
        self._enqueue(folder)
        return folder

    def list(self) -> list[JobFolder]:
        """Newest first."""
        found = [JobFolder(path) for path in self._root.glob(f"{_PREFIX}*")]
        return sorted(found, key=lambda f: (-f.state.created_at, f.path.name))

    def get(self, job_id: str) -> JobFolder:
        """Raises ObjectNotFoundError."""
        name = job_id.removeprefix(_PREFIX)
        folder = JobFolder(self._root / f"{_PREFIX}{name}")
        if not (name.isalnum() and name.isascii() and (folder.path / "job.json").is_file()):
            raise ObjectNotFoundError("Could not find that fine-tuning job.", "fine_tuning_job_id")
        return folder

    async def cancel(self, folder: JobFolder) -> None:
        """Raises InvalidRequestError when it has ended."""
        if folder.state.status in ENDED:
            raise InvalidRequestError(f"The job has already {folder.state.status}.")
        folder.end(CANCELLED)
        if process := self._processes.get(folder.path.name):
            await self._end(process)
        elif task := self._tasks.get(folder.path.name):
            task.cancel()

    def _enqueue(self, folder: JobFolder) -> None:
        folder.change(status=QUEUED)
        task = asyncio.create_task(self._run(folder))
        self._tasks[folder.path.name] = task
        task.add_done_callback(lambda _: self._tasks.pop(folder.path.name, None))

    async def _run(self, folder: JobFolder) -> None:
        await self._ready.wait()
        async with self._slots:
            if self._stopping or folder.state.status in ENDED:
                return
            folder.change(status=RUNNING, started_at=folder.state.started_at or int(time.time()))
            try:
                status = await self._train(folder)
                if status == 0:
                    await self._publish_checkpoints(folder)
            except (OSError, LorinerError) as error:
                logger.exception("training job %s", folder.path.name)
                folder.end(FAILED, {"code": "internal_error", "message": str(error), "param": None})
                return
            self._conclude(folder, status)

    def _conclude(self, folder: JobFolder, status: int) -> None:
        if folder.state.status == CANCELLED:
            return
        if self._stopping and status == INTERRUPTED:
            folder.change(status=QUEUED)
        elif status == 0:
            folder.end(SUCCEEDED)
        else:
            error = {"code": "training_failed", "message": folder.failure(), "param": None}
            folder.end(FAILED, error)

    async def _train(self, folder: JobFolder) -> int:
        command = [sys.executable, "-m", "loriner", "train"]
        command += ["--config", str(folder.path / "settings.toml"), "--publish", self._url]
        command += ["--resume"] if folder.has_checkpoint() else []
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LORINER_")}
        environment["LORINER_ADMIN_KEY"] = self._key
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with folder.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        self._processes[folder.path.name] = process
        try:
            return await process.wait()
        finally:
            del self._processes[folder.path.name]

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        _signal(process, signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            _signal(process, signal.SIGKILL)

    async def _publish_checkpoints(self, folder: JobFolder) -> None:
        """Each checkpoint that is left becomes an adapter, NAME-step-N."""
        names = {}
        for step, path in folder.checkpoints().items():
            name = f"{folder.state.name}-step-{step}"
            with tempfile.TemporaryDirectory(dir=folder.path) as clean:
                await asyncio.to_thread(_copy_adapter, path, Path(clean))
                await self._service.publish(Path(clean), name, source="train")
            names[str(step)] = name
        folder.change(checkpoints=names)


def _copy_adapter(source: Path, target: Path) -> None:
    """Without the optimiser's state and the history."""
    for file in source.iterdir():
        if is_kept(file.name):
            shutil.copyfile(file, target / file.name)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
