"""`loriner chat`: talk to a running server, one question or many."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console

from loriner.commands.remote import Remote, RemoteError, add_flags

_HELP = "/adapter NAME (empty: the base), /clear forgets the conversation, /exit leaves"


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="chat with a running server",
        description="Chat with a running server. With PROMPT, or with text on standard input, one "
        f"answer; else a conversation, in which: {_HELP}.",
    )
    parser.add_argument("prompt", nargs="?", help="ask this and leave")
    parser.add_argument("--adapter", default="", help="who answers (default: the base)")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: no limit)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 1)")
    parser.add_argument("--seed", type=int, help="make sampling repeatable")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    with Remote(args.url, args.key) as remote:
        conversation = Conversation(remote, args, console)
        if prompt is None:
            conversation.talk()
        else:
            conversation.ask(prompt)
    return 0


class Conversation:
    """The messages so far, and who answers the next one."""

    def __init__(self, remote: Remote, args: argparse.Namespace, console: Console) -> None:
        self._remote = remote
        self._console = console
        self._adapter: str = args.adapter
        self._start = [{"role": "system", "content": args.system}] if args.system else []
        self._messages = list(self._start)
        names = ("max_tokens", "temperature", "seed")
        self._sampling = {name: getattr(args, name) for name in names}

    def talk(self) -> None:
        """Ask what the user types until the end of input."""
        self._console.print(_HELP, style="dim")
        while True:
            try:
                line = self._console.input(f"[bold]{self._adapter or 'base'}>[/] ").strip()
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            if line == "/clear":
                self._messages = list(self._start)
            elif line.startswith("/adapter"):
                self._adapter = line.removeprefix("/adapter").strip()
            elif line.startswith("/"):
                self._console.print(_HELP, style="dim")
            elif line:
                self._try(line)

    def ask(self, prompt: str) -> None:
        """Print the answer to `prompt` as it comes and remember both. Raises RemoteError."""
        messages = [*self._messages, {"role": "user", "content": prompt}]
        body = {"messages": messages, "adapter": self._adapter, "stream": True, **self._sampling}
        pieces = []
        for piece in self._remote.chat(body):
            pieces.append(piece)
            self._console.out(piece, end="", highlight=False)
        self._console.out("")
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _try(self, prompt: str) -> None:
        try:
            self.ask(prompt)
        except RemoteError as error:
            self._console.print(str(error), style="red", markup=False)
