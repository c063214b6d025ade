"""A real `loriner serve` process and what its clients see of it: answers, streams, steady traffic.

Knows commands and HTTP, nothing of what is inside. Every answer is read with its token ids, so that
a test can compare it with what the same request gives alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--port", "0", "--num-threads", "1", "--kv-bytes", "64M")
Case = tuple[str, str | None]  # prompt, adapter


@dataclass
class Answer:
    """One answer as its client saw it."""

    status: int
    token_ids: list[int] = field(default_factory=list)
    generations: list[str | None] = field(default_factory=list)  # of header and body
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False  # a stream ended with [DONE]
    num_cached: int = 0  # tokens of the prompt that were in the KV cache
    ended_at: float = 0.0  # monotonic seconds

    @property
    def generation(self) -> str | None:
        """The one generation that header and body agree on; None for the base."""
        assert self.generations and len(set(self.generations)) == 1, self.generations
        return self.generations[0]


class Stream:
    """A streaming request that a thread reads to its end."""

    def __init__(self, answer: Future[Answer], has_begun: threading.Event) -> None:
        self._answer, self._has_begun = answer, has_begun

    def wait_begun(self) -> Stream:
        """Until the first token is here."""
        deadline = time.monotonic() + 20
        while not self._has_begun.wait(0.01):
            assert not self._answer.done(), f"ended before its first token: {self.result()}"
            assert time.monotonic() < deadline, "no token came"
        return self

    def result(self) -> Answer:
        return self._answer.result(30)


class ServerProcess:
    """`with ServerProcess(base, store, "--max-seats", "2") as server: server.ask("hi")`."""

    def __init__(self, base: Path, store: Path, *flags: str, key: str = "") -> None:
        self.store = store
        self.started_at = time.monotonic()
        self._log = store.with_name(f"{store.name}-{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "loriner", "serve", "--model", str(base)]
        command += ["--store", str(store), *FLAGS, *flags]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
        environment |= {"LORINER_API_KEY": key} if key else {}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(headers=headers, timeout=30)
        self._threads = ThreadPoolExecutor(32)

    def __enter__(self) -> ServerProcess:
        try:
            self.http.base_url = self._find_url()
            self.wait_for("/ready", 200)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._threads.shutdown()
        self.http.close()

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        children = psutil.Process(self.process.pid).children()
        (found,) = [child for child in children if "loriner.engine.worker" in child.cmdline()]
        return found

    @property
    def grpc_address(self) -> str:
        """Of the gRPC door; started with `--grpc-port 0`."""
        return self._find(r"gRPC is listening on (\S+)")

    def _find_url(self) -> str:
        return self._find(r"listening on (http://\S+)")

    def _find(self, pattern: str) -> str:
        """What the log says, as soon as it says it."""
        wait_until(lambda: re.search(pattern, self.log) is not None, 30, self)
        found = re.search(pattern, self.log)
        assert found
        return found[1]

    def wait_for(self, probe: str, status: int, timeout_s: float = 30.0) -> float:
        """Seconds until `probe` answers with `status`."""
        return wait_until(lambda: self.http.get(probe).status_code == status, timeout_s, self)

    def terminate(self) -> Future[int]:
        """Send SIGTERM; the exit code is there when the process has ended."""
        self.process.send_signal(signal.SIGTERM)
        return self._threads.submit(self.process.wait, 30)

    def ask(self, prompt: str, adapter: str | None = None, **more: Any) -> Answer:
        """One request, answered in one piece."""
        response = self.http.post("/v1/chat/completions", json=chat_body(prompt, adapter, **more))
        body = response.json()
        if response.status_code != 200:
            return Answer(response.status_code, error=body["error"], ended_at=time.monotonic())
        answer = Answer(200, generations=[_header(response)], ended_at=time.monotonic())
        _add(answer, body)
        return answer

    def read(
        self,
        prompt: str,
        adapter: str | None = None,
        on_token: Callable[[], object] = lambda: None,
        **more: Any,
    ) -> Answer:
        """One streamed request, read to its end."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = chat_body(prompt, adapter, **options, **more)
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            answer = Answer(response.status_code)
            if answer.status != 200:
                answer.error = json.loads(response.read())["error"]
            else:
                answer.generations.append(_header(response))
                for event in _events(response):
                    _add(answer, event)
                    if answer.token_ids:
                        on_token()
        answer.ended_at = time.monotonic()
        return answer

    def later(self, call: Callable[..., Answer], *args: Any, **more: Any) -> Future[Answer]:
        """`ask` or `read` on a thread of its own."""
        return self._threads.submit(call, *args, **more)

    def stream(self, prompt: str, adapter: str | None = None, **more: Any) -> Stream:
        """A streamed request that is read beside the test."""
        begun = threading.Event()
        return Stream(self.later(self.read, prompt, adapter, begun.set, **more), begun)

    def publish(self, folder: Path, name: str) -> str:
        """Upload the adapter in `folder`; its generation."""
        files = {path.name: (path.name, path.read_bytes()) for path in folder.iterdir()}
        response = self.http.post("/admin/adapters", data={"name": name}, files=files)
        assert response.status_code == 201, response.text
        return str(response.json()["generation"])

    def models(self) -> list[str]:
        """What /v1/models lists."""
        return [model["id"] for model in self.http.get("/v1/models").json()["data"]]


class Traffic:
    """Good requests in a steady stream beside a test; each answer is compared with `expected`."""

    def __init__(
        self, server: ServerProcess, expected: Mapping[Case, list[int]], num_clients: int = 3
    ) -> None:
        self.num_answers = 0
        self.slowest_s = 0.0
        self._server, self._expected = server, expected
        self._faults: list[str] = []
        self._ends = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(num_clients)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(30)
        if kind is None:
            assert not self._faults, self._faults[:5]
            assert self.num_answers > len(self._expected), "hardly any traffic"

    def wait_for_more(self, num_answers: int = 20) -> None:
        """Until that many answers have come since now."""
        goal = self.num_answers + num_answers
        wait_until(lambda: self.num_answers >= goal or bool(self._faults), 30)

    def _run(self, client: int) -> None:
        cases = list(self._expected)
        turn = client * len(cases) // len(self._threads)
        while not self._ends.is_set():
            case = cases[turn % len(cases)]
            turn += 1
            started = time.monotonic()
            try:
                answer = self._server.read(*case)
            except httpx.HTTPError as error:
                self._faults.append(f"{case}: {error!r}")
                continue
            if answer.token_ids != self._expected[case] or not answer.is_done:
                self._faults.append(f"{case}: {answer}")
            self.slowest_s = max(self.slowest_s, answer.ended_at - started)
            self.num_answers += 1


def chat_body(prompt: str, adapter: str | None, **more: Any) -> dict[str, Any]:
    """A greedy request whose answer is a function of prompt and adapter alone."""
    body = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    messages = [{"role": "user", "content": prompt}]
    chosen = {"adapter": adapter} if adapter else {}
    return {"messages": messages, **body, **chosen, **more}


def wait_until(
    is_true: Callable[[], bool], timeout_s: float = 10.0, server: ServerProcess | None = None
) -> float:
    """Seconds it took."""
    start = time.monotonic()
    while not is_true():
        log = server.log if server else ""
        assert time.monotonic() - start < timeout_s, f"it did not happen\n{log}"
        assert server is None or server.process.poll() is None, f"the server ended\n{log}"
        time.sleep(0.02)
    return time.monotonic() - start


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: "), line
            data = line.removeprefix("data: ")
            yield {"is_done": True} if data == "[DONE]" else json.loads(data)


def _add(answer: Answer, body: dict[str, Any]) -> None:
    """Take in a whole body, or one event of a stream."""
    answer.error = body.get("error") or answer.error
    answer.is_done |= body.get("is_done", False)
    if usage := body.get("usage"):
        answer.num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    if "loriner" in body:
        answer.generations.append(body["loriner"]["generation"])
    for choice in body.get("choices", ()):
        answer.token_ids += choice.get("token_ids") or ()
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def _header(response: httpx.Response) -> str | None:
    generation = response.headers["x-loriner-generation"]
    return None if generation == "base" else str(generation)
