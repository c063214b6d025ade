"""Publishing what was trained: upload under a candidate name, replay the canaries, then point the
name at it.

Through a server's doors (`Remote`), or straight into a store with an engine of our own. Invariant:
a name only moves to a generation whose replay agreed, and an alias only when the gate passed.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from rich.console import Console

from loriner.adapters.names import AdapterName, parse_name
from loriner.commands.remote import Remote, RemoteError, default_key, upload_parts
from loriner.errors import TrainError
from loriner.train.canaries import Canary, Replay, difference, read
from loriner.train.settings import TOLERANCE_HELP, JobConfig, PromoteConfig, PublishConfig

if TYPE_CHECKING:
    from loriner.train.files import Settings
    from loriner.train.save import Finished

ADAPTERS = "/admin/adapters"
CANDIDATE = ".candidate"
NO_GENERATION = "0" * 64
ALLOWED = ("adapter_not_found", "adapter_conflict")  # said to who may change the name


class Served(Protocol):
    """A place that serves adapters."""

    def publish(self, folder: Path, name: str) -> str:
        """The generation."""

    def replay(self, canary: Canary, adapter: str) -> Replay: ...

    def point(self, name: str, generation: str) -> None: ...

    def forget(self, name: str) -> None: ...


class RemoteServed:
    """A running server."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def publish(self, folder: Path, name: str) -> str:
        with contextlib.ExitStack() as stack:
            files = upload_parts(folder, stack)
            report = self._remote.call("POST", ADAPTERS, data={"name": name}, files=files)
        return str(report["generation"])

    def replay(self, canary: Canary, adapter: str) -> Replay:
        body: dict[str, Any] = {
            "adapter": adapter,
            "temperature": 0,
            "max_tokens": len(canary.token_ids),
            "ignore_eos": True,
            "return_token_ids": True,
        }
        top = len(canary.logprobs[0])
        if canary.messages:
            body |= {"messages": list(canary.messages), "logprobs": True, "top_logprobs": top}
            return _of_chat(self._remote.call("POST", "/v1/chat/completions", json=body))
        body |= {"prompt": canary.text, "logprobs": top}
        return _of_text(self._remote.call("POST", "/v1/completions", json=body))

    def point(self, name: str, generation: str) -> None:
        self._remote.call("PUT", f"/admin/aliases/{quote(name)}", json={"target": generation})

    def forget(self, name: str) -> None:
        self._remote.call("DELETE", f"{ADAPTERS}/{quote(name)}")


def add_tolerance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--canary-tolerance", type=float, metavar="NATS", help=TOLERANCE_HELP)


def check_target(settings: Settings) -> None:
    """Ask the server, once, whether it is there and the key may publish; changes nothing. Raises
    TrainError."""
    target = settings.publish
    if not target.publish:
        return
    path = f"{ADAPTERS}/{quote(str(_candidate(parse_name(settings.jobs[0].name))))}"
    try:
        with Remote(target.publish, target.key) as remote:
            remote.call("DELETE", path, headers={"if-match": f'"{NO_GENERATION}"'})
    except RemoteError as error:
        if error.code not in ALLOWED:
            raise TrainError(
                f"nothing was trained, as it could not be published: {error}"
            ) from None


def publish_all(finished: Sequence[Finished], settings: Settings, console: Console) -> int:
    """Publish each and promote; 1 when a gate held one back. When it fails, says how to publish
    the rest by hand."""
    if not settings.publish.is_wanted:
        return 0
    rest = list(zip(settings.jobs, settings.promote, finished, strict=True))
    is_held_back = False
    try:
        with _open(settings) as served:
            while rest:
                is_held_back |= not _publish_one(served, *rest[0], console)
                rest.pop(0)
    except BaseException:
        how = "By hand" if settings.publish.publish else "By hand, once that store is served"
        for line in (line for part in rest for line in _by_hand(settings.publish, *part)):
            console.print(f"{how}: {line}", markup=False)
        raise
    return 1 if is_held_back else 0


def _publish_one(
    served: Served, job: JobConfig, asked: PromoteConfig, result: Finished, console: Console
) -> bool:
    """False when the gate kept the alias where it is."""
    name, alias = parse_name(job.name), asked.alias(job.name)
    generation = publish_checked(served, result.folder, name, asked.canary_tolerance)
    console.print(f"{name} is generation {generation}: served as it was trained.")
    if alias and result.gate.passed:
        served.point(str(alias), generation)
        console.print(f"{alias} is generation {generation}.")
    elif alias:
        console.print(f"{alias} stays as it is: the gate has not passed.")
    return alias is None or result.gate.passed


def _by_hand(
    target: PublishConfig, job: JobConfig, asked: PromoteConfig, result: Finished
) -> Iterator[str]:
    """The commands that publish and promote it in a running server."""
    where = ["--url", target.publish] if target.publish else []
    if target.publish and target.key != default_key():
        where += ["--key", "..."]
    limit = asked.canary_tolerance
    words = [] if limit is None else ["--canary-tolerance", f"{limit:g}"]
    alias = asked.alias(job.name)
    add = ["loriner", "adapters", "add", "--canaries", *where, *words]
    yield shlex.join([*add, job.name, str(result.folder)])
    if alias and result.gate.passed:
        yield shlex.join(["loriner", "adapters", "alias", *where, str(alias), job.name])


def publish_checked(
    served: Served, folder: Path, name: AdapterName, tolerance: float | None
) -> str:
    """The generation that `name` stands for now. Raises TrainError when it is not served as it was
    trained; the name is then what it was."""
    canaries = read(folder)
    if not canaries.canaries:
        raise TrainError(f"{folder} has no canaries, so nothing could show what is served.")
    limit = canaries.tolerance if tolerance is None else tolerance
    candidate = str(_candidate(name))
    generation = served.publish(folder, candidate)
    try:
        for number, canary in enumerate(canaries.canaries, 1):
            found = difference(canary, served.replay(canary, candidate), limit)
            if found:
                raise TrainError(
                    f"{name} was not published: canary {number} of {len(canaries.canaries)} is "
                    f"served otherwise than it was trained: {found}."
                )
        served.point(str(name), generation)
    finally:
        served.forget(candidate)
    return generation


def _candidate(name: AdapterName) -> AdapterName:
    return AdapterName(name.tenant, name.short[: 64 - len(CANDIDATE)] + CANDIDATE)


@contextlib.contextmanager
def _open(settings: Settings) -> Iterator[Served]:
    target = settings.publish
    if target.store is None:
        with Remote(target.publish, target.key) as remote:
            yield RemoteServed(remote)
        return
    from loriner.train.stored import StoreServed

    with StoreServed(settings.run, target.store) as served:
        yield served


def _of_chat(answer: dict[str, Any]) -> Replay:
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    return Replay(
        prompt_ids=tuple(answer["prompt_token_ids"]),
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(_descending(t["logprob"] for t in e["top_logprobs"]) for e in entries),
    )


def _of_text(answer: dict[str, Any]) -> Replay:
    choice = answer["choices"][0]
    tops = choice["logprobs"]["top_logprobs"]
    return Replay(
        prompt_ids=tuple(choice["prompt_token_ids"]),
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(_descending(top.values()) for top in tops),
    )


def _descending(values: Any) -> tuple[float, ...]:
    return tuple(sorted(values, reverse=True))
