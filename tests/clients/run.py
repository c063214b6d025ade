"""Other people's clients against a server, each in its own virtual environment.

    python tests/clients/run.py                                   a scripted server of its own
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

# LlamaIndex needs openai < 3, so the three cannot share one environment.
PACKAGES = {
    "openai": ["openai>=3,<4"],
    "langchain": ["langchain-openai>=1.7,<2"],
    "llamaindex": ["llama-index-llms-openai-like>=0.8,<1"],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("clients", nargs="*", default=list(PACKAGES), help=", ".join(PACKAGES))
    parser.add_argument("--url", help="server to use (default: a scripted one)")
    parser.add_argument("--adapter", default="pirate", help="adapter the server has")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/loriner/clients")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        url = args.url or stack.enter_context(scripted_server())
        failed = [name for name in args.clients if not run(name, url, args.adapter, args.cache)]
    return 1 if failed else 0


def run(name: str, url: str, adapter: str, cache: Path) -> bool:
    """Whether the scenario of client `name` succeeds; its output is shown when it does not."""
    python = environment(name, cache)
    names = {"URL": f"{url}/v1", "MODEL": first_model(url), "ADAPTER": adapter}
    env = os.environ | {f"SCENARIO_{key}": value for key, value in names.items()}
    scenario = HERE / f"scenario_{name}.py"
    done = subprocess.run([python, scenario], env=env, capture_output=True, text=True)
    version = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True)
    wanted = [item.partition(">")[0] for item in PACKAGES[name]]
    found = [line for line in version.stdout.splitlines() if line.partition("=")[0] in wanted]
    sys.stdout.write(f"{name:12} {' '.join(found):44} {'FAILED' if done.returncode else 'ok'}\n")
    sys.stdout.write(done.stdout + done.stderr if done.returncode else "")
    return done.returncode == 0


def environment(name: str, cache: Path) -> Path:
    """The Python of client `name`'s environment, made on first use."""
    folder = cache / name
    python = folder / "bin" / "python"
    stamp = folder / "installed.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != PACKAGES[name]:
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PACKAGES[name]], check=True)
        stamp.write_text(json.dumps(PACKAGES[name]))
    return python


def first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return str(json.load(response)["data"][0]["id"])


@contextlib.contextmanager
def scripted_server() -> Iterator[str]:
    """The real HTTP door in front of a scripted engine."""
    sys.path[:0] = [str(ROOT), str(ROOT / "server")]
    from loriner.config import ServerConfig
    from tests.api.fake_service import FakeService
    from tests.api.live import LiveServer

    with tempfile.TemporaryDirectory() as folder:
        service = FakeService(Path(folder), "pirate")
        with LiveServer(service, ServerConfig(port=0, store=Path(folder))) as live:
            yield live.url


if __name__ == "__main__":
    sys.exit(main())
