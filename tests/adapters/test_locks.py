"""Locks hold between stores and processes and die with their holder."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import loriner
from loriner.adapters.locks import Locks

HOLDER = """
import sys, time
from pathlib import Path
from loriner.adapters.locks import Locks
locks = Locks(Path(sys.argv[1]))
print(locks.try_own(7), flush=True)
time.sleep(60)
"""


def test_one_owner_or_many_sharers(tmp_path: Path) -> None:
    one, other = Locks(tmp_path / "lock"), Locks(tmp_path / "lock")
    assert one.try_share(1 << 60) and other.try_share(1 << 60)
    assert not one.try_own(1 << 60)
    other.release(1 << 60)
    assert one.try_own(1 << 60) and not other.try_share(1 << 60)
    assert other.try_own((1 << 60) + 1)
    one.close()
    assert other.try_own(1 << 60)
    other.close()


def test_a_waiter_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    one, other = Locks(tmp_path / "lock"), Locks(tmp_path / "lock")
    entered = threading.Event()

    def wait() -> None:
        with other.owning(0):
            entered.set()

    with one.owning(0):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(5)
    assert entered.is_set()
    one.close()
    other.close()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    root = str(Path(loriner.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": root},
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        locks = Locks(path)
        assert not locks.try_share(7)
        holder.kill()
        holder.wait()
        assert locks.try_own(7)
        locks.close()
