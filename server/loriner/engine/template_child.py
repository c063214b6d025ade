"""The process in which templates of adapters are compiled and rendered: a loop over requests.

It has transformers' sandbox, bounded memory and nothing to steal; whoever started it kills it when
it takes too long. Invariant: every request is answered with a text or with a reason.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

MAX_MEMORY = 1 << 30  # bytes of address space beyond what is there when it starts
MAX_RENDERED = 4 << 20  # characters
ALONE_S = 10  # it ends by itself when nobody is left to end it


def main() -> None:
    """Entry point of the child."""
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
        render_jinja_template,
    )

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Connection(int(sys.argv[1]))
    _bound_memory()
    channel.send_bytes(b"{}")
    with contextlib.suppress(EOFError):
        while True:
            request = json.loads(channel.recv_bytes())
            signal.alarm(ALONE_S)
            answer = _answer(request, _compile_jinja_template, render_jinja_template)
            signal.alarm(0)
            channel.send_bytes(json.dumps(answer).encode())


def _answer(request: dict[str, Any], compile_: Any, render: Any) -> dict[str, str]:
    template, messages = request["template"], request["messages"]
    try:
        if messages is None:
            compile_(template)
            return {"text": ""}
        (text,), _ = render([messages], chat_template=template, **request["kwargs"])
    except MemoryError:
        return {"reason": "it needs too much memory"}
    except RecursionError:
        return {"reason": "it is nested too deeply"}
    except Exception as error:  # noqa: BLE001  a template may raise what it likes
        return {"reason": f"{type(error).__name__}: {error}"[:500]}
    if len(text) > MAX_RENDERED:
        return {"reason": f"it writes more than {MAX_RENDERED} characters"}
    return {"text": text}


def _bound_memory() -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
