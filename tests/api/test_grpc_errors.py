"""Errors over gRPC: one status for each row of the table, details that fit in a trailer."""

from __future__ import annotations

import grpc
import pytest

from loriner import errors
from loriner.api.grpc_errors import code_of, status_of
from loriner.api.status import TABLE, error_body
from tests.api.test_status import ALL, make


@pytest.mark.parametrize("cls", TABLE, ids=lambda cls: cls.__name__)
def test_each_row_has_a_code_that_grpc_knows(cls: type[errors.LorinerError]) -> None:
    assert TABLE[cls].grpc in grpc.StatusCode.__members__
    assert (TABLE[cls].status >= 500) == (
        TABLE[cls].grpc in ("INTERNAL", "UNAVAILABLE", "DATA_LOSS")
    )


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_both_doors_say_the_same(cls: type[errors.LorinerError]) -> None:
    error = make(cls)
    status, body = status_of(error, "req-1"), error_body(error, "req-1")["error"]

    assert status.message == body["message"]
    assert status.code == code_of(error).value[0]
    reason = (body["code"] or "invalid_request").upper().encode()
    assert reason in status.details[0].value


def test_an_upload_with_many_faults_still_fits_in_a_trailer() -> None:
    error = errors.InvalidAdapterError([f"tensor {i} " + "x" * 400 for i in range(50)])

    assert len(status_of(error, "r").SerializeToString()) < 5000
