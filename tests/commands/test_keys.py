"""`loriner keys` on a store's folder, beside a server or without one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from loriner.api.tenants import Tenants
from loriner.cli import main


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORINER_STORE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_a_key_is_shown_once_listed_and_revoked(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", "acme", "--scopes", "infer, publish", "--note", "ci"]) == 0
    token = capsys.readouterr().out.split()[-1]
    key = Tenants(store).find(token)
    assert key is not None and (key.tenant, key.scopes) == ("acme", ("infer", "publish"))

    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(text in listed for text in (key.id, "acme", "infer, publish", "ci"))
    assert token not in listed and time.strftime("%Y") in listed
    assert main(["keys", "revoke", key.id]) == 0
    assert Tenants(store).find(token) is None


def test_no_keys_say_how_to_make_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list"]) == 0
    assert "loriner keys create" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "Acme"], "tenant's name"),
        (["create", "acme", "--scopes", "root"], "scopes must be some of"),
        (["revoke", "nope"], "no API key with the id"),
    ],
)
def test_what_cannot_be_is_an_error(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *arguments]) == 1
    assert words in capsys.readouterr().err
