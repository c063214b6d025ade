"""Other people's clients against a server, each in its own virtual environment.

    python tests/clients/run.py                                   servers of its own
    python tests/clients/run.py --url http://127.0.0.1:8000 --adapter pirate [openai langchain ...]

Environments are kept under --cache and made once. Exit status 1 when a client fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# LlamaIndex needs openai < 3, so they cannot share one environment.
PACKAGES = {
    "openai": ["openai>=3,<4"],
    "langchain": ["langchain-openai>=1.7,<2"],
    "litellm": ["litellm>=1.80,<2"],
    "llamaindex": ["llama-index-llms-openai-like>=0.8,<1"],
    "llamaindex_finetuning": [
        "llama-index-llms-openai-like>=0.8,<1",
        "llama-index-postprocessor-cohere-rerank>=0.5,<1",
    ],
}
# Installed without what they require (torch, sentence-transformers, mistralai), of which the engine
# for OpenAI uses nothing.
BARE = {"llamaindex_finetuning": ["llama-index-finetuning>=0.4.2,<0.5"]}
TRAINS = ("llamaindex_finetuning",)  # need a server that trains


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("clients", nargs="*", default=list(PACKAGES), help=", ".join(PACKAGES))
    parser.add_argument("--url", help="server to use (default: a scripted one, or one that trains)")
    parser.add_argument("--adapter", default="pirate", help="adapter the server has")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/loriner/clients")
    args = parser.parse_args(argv)
    failed = []
    for name in args.clients:
        with contextlib.ExitStack() as stack:
            url = args.url or stack.enter_context(server_for(name))
            if not run(name, url, args.adapter, args.cache):
                failed.append(name)
    return 1 if failed else 0


def run(name: str, url: str, adapter: str, cache: Path) -> bool:
    """Whether the scenario of client `name` succeeds; its output is shown when it does not."""
    python = environment(name, cache)
    names = {"URL": f"{url}/v1", "MODEL": first_model(url), "ADAPTER": adapter}
    env = os.environ | {f"SCENARIO_{key}": value for key, value in names.items()}
    scenario = HERE / f"scenario_{name}.py"
    done = subprocess.run([python, scenario], env=env, capture_output=True, text=True)
    version = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True)
    wanted = [item.partition(">")[0] for item in [*PACKAGES[name], *BARE.get(name, ())]]
    found = [line for line in version.stdout.splitlines() if line.partition("=")[0] in wanted]
    sys.stdout.write(f"{name:12} {' '.join(found):44} {'FAILED' if done.returncode else 'ok'}\n")
    sys.stdout.write(done.stdout + done.stderr if done.returncode else "")
    return done.returncode == 0


def environment(name: str, cache: Path) -> Path:
    """The Python of client `name`'s environment, made on first use."""
    folder = cache / name
    python = folder / "bin" / "python"
    stamp = folder / "installed.json"
    wanted = [PACKAGES[name], BARE.get(name, [])]
    if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PACKAGES[name]], check=True)
        if name in BARE:
            subprocess.run([*install, "--no-deps", *BARE[name]], check=True)
        stamp.write_text(json.dumps(wanted))
    return python


def first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return str(json.load(response)["data"][0]["id"])


def server_for(name: str) -> contextlib.AbstractContextManager[str]:
    """What client `name` needs, as its URL."""
    sys.path[:0] = [str(ROOT), str(ROOT / "server")]
    return training_server() if name in TRAINS else scripted_server()


@contextlib.contextmanager
def training_server() -> Iterator[str]:
    """`loriner serve --training` on a tiny random base."""
    from tests.servers import ServerProcess
    from tests.tiny import write_tiny_base

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_tiny_base(folder / "tiny")
        flags = ("--training-threads", "1", "--training", str(folder / "training"))
        with ServerProcess(base, folder / "store", *flags) as server:
            yield server.url


@contextlib.contextmanager
def scripted_server() -> Iterator[str]:
    """The real HTTP door in front of a scripted engine."""
    from loriner.config import ServerConfig
    from tests.api.fake_service import FakeService
    from tests.api.live import LiveServer

    with tempfile.TemporaryDirectory() as folder:
        service = FakeService(Path(folder), "pirate")
        with LiveServer(service, ServerConfig(port=0, store=Path(folder))) as live:
            yield live.url


if __name__ == "__main__":
    sys.exit(main())
