"""`loriner demo`: the whole of Loriner in one command.

Pulls the base when it is missing, serves, publishes the bundled adapters through the public door,
and shows one prompt answered by the base and by each adapter from one mixed batch. Then it keeps
serving.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.table import Table

from loriner.commands.models import pull_base
from loriner.commands.remote import TIMEOUT, RemoteError, upload_parts
from loriner.commands.serve import Settings, add_settings, serve, settings_of

if TYPE_CHECKING:
    from loriner.api.server import Server

ADAPTERS = Path(__file__).resolve().parent.parent / "data" / "adapters"
BASE = "smollm2"
CURL_ADAPTER = "pirate"
PROMPT = "What is the code word for tiger?"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one of them said."""

    who: str
    text: str
    num_tokens: int
    generation: str | None


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="see it work: pull, serve, and compare adapters on one prompt",
        description="Pull the base if it is missing, serve it with the bundled adapters, answer "
        "one prompt with the base and each adapter in one batch, and keep serving.",
    )
    parser.add_argument("--prompt", default=PROMPT, help=f"what to ask (default: {PROMPT!r})")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer (default: 48)")
    parser.add_argument("--once", action="store_true", help="leave after the answers")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    settings = settings_of(args)
    if not (settings[0].model / "config.json").is_file():
        console.print(f"There is no base in {settings[0].model} yet: pulling {BASE}.")
        pull_base(BASE, settings[0].model, console)

    async def show(server: Server) -> None:
        await Demo(server.url, settings, console).show(args.prompt, args.max_tokens)
        if args.once:
            server.should_exit = True
        else:
            console.print("\nServing until Ctrl-C.")

    serve(settings, console, show)
    return 0


class Demo:
    """A client of the server that runs beside it."""

    def __init__(self, url: str, settings: Settings, console: Console) -> None:
        self._url = url
        self._console = console
        self._keys = settings[1].api_key, settings[1].admin_key or settings[1].api_key

    async def show(self, prompt: str, max_tokens: int) -> None:
        """Publish, ask everyone at once, print. Raises RemoteError."""
        async with httpx.AsyncClient(
            base_url=self._url, timeout=TIMEOUT, trust_env=False
        ) as client:
            folders = sorted(path for path in ADAPTERS.iterdir() if path.is_dir())
            for folder in folders:
                await self._publish(client, folder)
            names = [folder.name for folder in folders]
            start = time.perf_counter()
            asked = [self._ask(client, name, prompt, max_tokens) for name in ("", *names)]
            answers = await asyncio.gather(*asked)
            seconds = time.perf_counter() - start
        self._print(prompt, answers, seconds)
        self._print_curl()

    async def _publish(self, client: httpx.AsyncClient, folder: Path) -> None:
        with contextlib.ExitStack() as stack:
            files = {
                name: (file_name, file.read())
                for name, (file_name, file) in upload_parts(folder, stack).items()
            }
        data = {"name": folder.name}
        headers = _bearer(self._keys[1])
        answer = await client.post("/admin/adapters", data=data, files=files, headers=headers)
        report = _checked(answer)
        self._console.print(
            f"Adapter {report['name']}: rank {report['ranks'][-1]}, {report['modules_matched']} "
            f"modules, {report['num_bytes'] / 1e6:.1f} MB, generation {report['generation'][:12]}"
        )

    async def _ask(
        self, client: httpx.AsyncClient, adapter: str, prompt: str, max_tokens: int
    ) -> Answer:
        body = {
            "adapter": adapter,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        headers = _bearer(self._keys[0])
        answer = _checked(await client.post("/v1/chat/completions", json=body, headers=headers))
        return Answer(
            who=adapter or "base",
            text=answer["choices"][0]["message"]["content"].strip(),
            num_tokens=answer["usage"]["completion_tokens"],
            generation=answer["loriner"]["generation"],
        )

    def _print(self, prompt: str, answers: list[Answer], seconds: float) -> None:
        table = Table("who", "answer", "generation", title=prompt, show_lines=True)
        for answer in answers:
            digest = (answer.generation or "")[:12]
            table.add_row(answer.who, _plain(answer.text), digest)
        self._console.print(table, soft_wrap=False)
        num_tokens = sum(answer.num_tokens for answer in answers)
        self._console.print(
            f"{len(answers)} answers in one mixed batch: {num_tokens} tokens in {seconds:.1f} s."
        )

    def _print_curl(self) -> None:
        key = ' -H "Authorization: Bearer $LORINER_API_KEY"' if self._keys[0] else ""
        body = {
            "adapter": CURL_ADAPTER,
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        }
        self._console.print("\nTry it:")
        for line in (
            f"curl {self._url}/v1/models{key}",
            f"curl {self._url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'",
        ):
            self._console.print(f"  {line}", markup=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def _checked(response: httpx.Response) -> dict[str, Any]:
    answer: dict[str, Any] = response.json()
    if response.status_code >= 400:
        raise RemoteError(answer["error"]["message"])
    return answer
