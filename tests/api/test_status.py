"""The error table: complete, consistent with OpenAI's body, and silent about internals."""

from __future__ import annotations

import inspect
import json

import pytest

from loriner import errors
from loriner.api.responses import error_response
from loriner.api.status import INTERNAL, TABLE, error_body, row_of

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.LorinerError)
]
LEAVES = [cls for cls in ALL if not any(other.__base__ is cls for other in ALL)]


def make(cls: type[errors.LorinerError]) -> errors.LorinerError:
    return cls(["first", "second"]) if cls is errors.InvalidAdapterError else cls("secret")  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.__name__)
def test_each_leaf_of_the_tree_has_its_own_row(cls: type[errors.LorinerError]) -> None:
    assert cls in TABLE


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_each_body_has_the_four_keys(cls: type[errors.LorinerError]) -> None:
    error = error_body(make(cls), "req-1")["error"]

    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_a_server_error_says_the_request_id_and_nothing_of_its_cause(
    cls: type[errors.LorinerError],
) -> None:
    response = error_response(make(cls), "req-1")
    message = json.loads(bytes(response.body))["error"]["message"]

    if response.status_code >= 500:
        assert "secret" not in message
        assert "req-1" in message


def test_an_exception_that_is_not_ours_is_an_internal_error() -> None:
    assert row_of(RuntimeError("0x7f")) is INTERNAL
    assert "0x7f" not in json.dumps(error_body(RuntimeError("0x7f"), "r"))


def test_a_subclass_without_a_row_takes_its_parents() -> None:
    class Narrow(errors.OverloadedError):
        pass

    assert row_of(Narrow("full")).status == 429


@pytest.mark.parametrize(
    ("error", "seconds", "milliseconds"),
    [
        (errors.OverloadedError("full", 0.25), "1", "250"),
        (errors.EngineUnavailableError("starting", 2.5), "3", "2500"),
    ],
)
def test_what_may_be_tried_again_says_when(
    error: errors.LorinerError, seconds: str, milliseconds: str
) -> None:
    response = error_response(error, "r")

    assert response.headers["retry-after"] == seconds
    assert response.headers["retry-after-ms"] == milliseconds


@pytest.mark.parametrize("cls", [errors.AdapterConflictError, errors.AdapterQuarantinedError])
def test_what_will_not_get_better_tells_clients_not_to_retry(
    cls: type[errors.LorinerError],
) -> None:
    assert error_response(cls("no"), "r").headers["x-should-retry"] == "false"


def test_a_refused_upload_lists_every_reason() -> None:
    error = error_body(errors.InvalidAdapterError(["one", "two"]), "r")["error"]

    assert error["reasons"] == ["one", "two"]
    assert "one; two" in error["message"]
