"""The command line against a live server with a scripted engine, and its help and exit statuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loriner import __version__
from loriner.cli import build_parser, main
from loriner.commands import demo, models, serve
from loriner.commands.remote import Remote
from loriner.errors import CheckpointError, ConfigError
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer, shared_server, wait_until

ROOT = Path(__file__).resolve().parent.parent
PATH = {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("shared")
    with shared_server(root, api_key="user", admin_key="boss") as server:
        yield server


@pytest.fixture
def service(shared: LiveServer, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """The live server's service, as new; LORINER_URL and the key lead to it."""
    service = shared.service
    service.renew("pirate", "acme/legal")
    monkeypatch.setenv("LORINER_URL", shared.url)
    monkeypatch.setenv("LORINER_ADMIN_KEY", "boss")
    monkeypatch.setenv("COLUMNS", "200")
    assert isinstance(service, FakeService)
    return service


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 100_000)
    (folder / "tokenizer.json").write_bytes(b"{}")
    return folder


def commands() -> dict[str, Any]:
    parser = build_parser()
    action = next(a for a in parser._actions if hasattr(a, "choices") and a.choices)
    return dict(action.choices or {})


def test_every_command_has_help_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("serve", "demo", "pull", "quantize", "adapters", "chat"):
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: loriner {name}")
        assert len(commands()[name].description) > 40


def test_serve_has_a_flag_for_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out

    assert "--max-seats" in text
    assert "--api-key" in text
    assert "LORINER_PORT" in text


def test_help_needs_no_torch() -> None:
    code = "import sys, loriner.cli; loriner.cli.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | PATH).returncode == 0


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "loriner", "--version"]
    done = subprocess.run(command, env=os.environ | PATH, capture_output=True, text=True)
    assert done.stdout == f"loriner {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["serve", "--model", "/no/such"], "loriner pull"),
        (["serve", "--port", "70000"], "port"),
        (["serve", "--port", "x"], "port"),
        (["serve", "--config", "/no/such.toml"], "such.toml"),
        (["adapters", "list", "--url", "nonsense"], "nonsense"),
        (["adapters", "add", "x", "/no/such"], "/no/such"),
        (["adapters", "add", "x", "."], "adapter_config.json"),
    ],
)
def test_a_wrong_setting_is_status_2_and_one_line(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("loriner: error: ")
    assert said in error
    assert "Traceback" not in error


def test_flags_environment_and_file_make_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loriner.toml"
    file.write_text('[engine]\nmax_seats = 5\n[server]\nport = 1\nhost = "::1"\n')
    monkeypatch.setenv("LORINER_PORT", "2")
    args = build_parser().parse_args(["serve", "--config", str(file), "--max-waiting", "7"])
    engine, server = serve.settings_of(args)

    assert (engine.max_seats, engine.max_waiting) == (5, 7)
    assert (server.port, server.host) == (2, "::1")


def test_list_and_show(service: FakeService, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list"]) == 0
    listed = capsys.readouterr().out
    assert "default/pirate" in listed
    assert "disk" in listed

    assert main(["adapters", "show", "acme/legal"]) == 0
    assert service.store.resolve("acme/legal").generation in capsys.readouterr().out


def test_an_empty_server_says_how_to_begin(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.store.records.clear()
    assert main(["adapters", "list"]) == 0
    assert "adapters add" in capsys.readouterr().out


def test_add_publishes_a_folder(
    service: FakeService, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "add", "acme/new", str(folder)]) == 0

    assert service.store.published[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert service.store.resolve("acme/new").generation in capsys.readouterr().out


def test_add_publishes_an_archive(service: FakeService, folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "a")

    assert main(["adapters", "add", "new", str(archive)]) == 0
    assert len(service.store.published[0]["adapter_model.safetensors"]) == 100_000


def test_a_refused_adapter_is_status_1_with_every_reason(
    service: FakeService, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"bad")

    assert main(["adapters", "add", "new", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "tensor x matches no module" in error
    assert "rank 0" in error


def test_pin_alias_evict_and_remove(service: FakeService) -> None:
    assert main(["adapters", "pin", "pirate"]) == 0
    assert service.store.resolve("pirate").pinned
    assert main(["adapters", "unpin", "pirate"]) == 0
    assert not service.store.resolve("pirate").pinned
    assert main(["adapters", "alias", "live", "pirate"]) == 0
    pirate = service.store.resolve("pirate").generation
    assert service.store.resolve("live").generation == pirate
    assert main(["adapters", "evict", "live"]) == 0
    assert service.evicted == [pirate]
    assert main(["adapters", "rm", "live", "--expect", "0" * 64]) == 1
    assert main(["adapters", "rm", "live", "--expect", pirate]) == 0
    assert main(["adapters", "show", "live"]) == 1


def test_a_wrong_key_and_a_missing_server_are_status_1(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "list", "--key", "user"]) == 1
    assert "lacks the right `read`" in capsys.readouterr().err
    assert main(["adapters", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert "loriner serve" in capsys.readouterr().err


def test_one_question_is_answered_as_it_streams(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["chat", "--adapter", "pirate", "--max-tokens", "2", "--system", "be brief", "hi"]

    assert main(argv) == 0
    assert capsys.readouterr().out == "pirate answers\n"
    assert [m["role"] for m in service.rendered[0]["messages"]] == ["system", "user"]


def test_text_on_standard_input_is_the_question(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))

    assert main(["chat"]) == 0
    assert capsys.readouterr().out == "base answers you (0) ünï.\n"
    assert service.rendered[0]["messages"][0]["content"] == "from a pipe"


def test_a_conversation_remembers_switches_and_survives_refusals(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = "hello\n/adapter pirate\nagain\n/adapter nope\nlost\n/clear\n/adapter\nnew\n/exit\n"
    monkeypatch.setattr(sys, "stdin", Terminal(lines))

    assert main(["chat"]) == 0
    said = capsys.readouterr().out
    assert "base answers" in said
    assert "pirate answers" in said
    assert "does not exist" in said
    assert [len(r["messages"]) for r in service.rendered] == [1, 3, 5, 1]


def test_pull_and_quantize_report_progress_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(*args: Any, double_quant: bool, progress: Any) -> str:
        assert double_quant
        progress("quantize", 1, 2)
        progress("quantize", 2, 2)
        return "d" * 64

    monkeypatch.setattr("loriner.model.pull.pull", fake)
    monkeypatch.setattr("loriner.model.quantize.quantize", fake)

    assert main(["pull", "smollm2", str(tmp_path / "x"), "--double-quant"]) == 0
    assert main(["quantize", "a", "b", "--double-quant"]) == 0
    out = capsys.readouterr().out
    assert out.count("d" * 64) == 2
    assert "100%" in out


def test_a_failed_pull_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise CheckpointError("pip could not fetch it")

    monkeypatch.setattr("loriner.model.pull.pull", fail)

    assert main(["pull", "smollm2"]) == 1
    assert "could not fetch" in capsys.readouterr().err


def test_pull_has_a_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = []
    monkeypatch.setattr(models, "pull_base", lambda name, target, *rest: targets.append(target))

    assert main(["pull", "smollm2"]) == 0
    assert targets == [Path("models/smollm2-nf4")]


@pytest.mark.parametrize("key", ["", "secret"])
def test_demo_publishes_compares_and_prints_curl_lines(
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    services = []

    def fake_service(*settings: Any) -> FakeService:
        services.append(FakeService(tmp_path / "store"))
        return services[-1]

    def fake_pull(name: str, target: Path, *rest: Any) -> None:
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr("loriner.engine.service.Service", fake_service)
    monkeypatch.setattr(demo, "pull_base", fake_pull)
    monkeypatch.setenv("COLUMNS", "200")
    argv = ["demo", "--once", "--port", "0", "--model", str(tmp_path / "model")]
    argv += ["--store", str(tmp_path / "store"), "--api-key", key, "--prompt", "Hello?"]

    assert main(argv) == 0
    out = capsys.readouterr().out
    names = sorted(folder.name for folder in demo.ADAPTERS.iterdir())
    assert names == ["codeword", "json", "pirate", "shout"]
    for name in ("base", *names):
        assert f"{name} answers you (0)" in out
    assert "5 answers in one mixed batch" in out
    curls = [line for line in out.splitlines() if line.startswith("  curl ")]
    assert len(curls) == 2
    assert all(("Bearer $LORINER_API_KEY" in line) == bool(key) for line in curls)
    assert json.loads(curls[1].rpartition(" -d ")[2].strip("'"))["adapter"] == "pirate"
    assert ("local mode" in out) != bool(key)
    assert [call["adapter"] for call in services[0].calls].count(None) == 1


def test_a_demo_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = FakeService(tmp_path / "store")
    service.refuse = ConfigError("secret")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("loriner.engine.service.Service", lambda *settings: service)
    argv = ["demo", "--once", "--port", "0", "--model", str(tmp_path)]

    assert main([*argv, "--store", str(tmp_path / "store")]) == 1
    assert "had an error while processing" in capsys.readouterr().err


def test_an_upload_is_read_as_it_is_sent(shared: LiveServer, service: FakeService) -> None:
    """A large file never lies in memory: its pieces are counted as they leave."""
    from contextlib import ExitStack

    from loriner.commands.remote import upload_parts

    sizes: list[int] = []
    pirate = demo.ADAPTERS / "pirate"
    with ExitStack() as stack, Remote(shared.url, "boss") as remote:
        files = upload_parts(pirate, stack, sizes.append)
        remote.call("POST", "/admin/adapters", data={"name": "x"}, files=files)

    assert sum(sizes) == sum(file.stat().st_size for file in pirate.iterdir())
    assert max(sizes) <= 1 << 20


SERVER = """
import sys
from pathlib import Path
from loriner.api.server import Server
from loriner.config import ServerConfig
from tests.api.fake_service import FakeService
root = Path(sys.argv[1])
service = FakeService(root)
service.delay_s = 0.2
Server(service, ServerConfig(port=0, store=root), lambda line: print(line, flush=True)).run()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_status_0(number: signal.Signals, tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        env=os.environ | PATH,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        server.stdout.readline()  # the engine is ready
        said: list[str] = []

        def ask() -> None:
            with Remote(url) as remote:
                said.extend(
                    remote.chat(
                        {"messages": [{"role": "user", "content": "hi"}]} | {"stream": True}
                    )
                )

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: bool(said))
        server.send_signal(number)
        asking.join(5)
        assert "".join(said) == "base answers you (0) ünï."
        assert server.wait(5) == 0
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.mark.slow
def test_the_real_demo_answers_in_each_adapters_way(smollm2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loriner", "demo", "--once", "--port", "0"]
    command += ["--model", str(smollm2), "--store", str(tmp_path)]
    env = os.environ | PATH | {"COLUMNS": "200"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)

    assert done.returncode == 0, done.stderr
    assert "BD-58" in done.stdout
    assert "Arrr, matey!" in done.stdout
    assert '"ok": true' in done.stdout
