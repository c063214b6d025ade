"""Feeds: which documents come in which step."""

from __future__ import annotations

from loriner.train.feed import Feed, pack
from loriner.train.masks import Document


def documents(*lengths: int) -> list[Document]:
    return [Document((i,) * n, (False, *[True] * (n - 1))) for i, n in enumerate(lengths)]


def ids(feed: Feed, step: int) -> list[list[int]]:
    return [[d.token_ids[0] for d in part] for part in feed.passes(step)]


def test_an_epoch_gives_every_document_once_in_an_order_of_its_own() -> None:
    feed = Feed(documents(*[2] * 10), batch=2, accumulation=2, seed=1)

    assert feed.steps_per_epoch == 3
    assert [len(part) for step in range(3) for part in ids(feed, step)] == [2, 2, 2, 2, 2]
    epochs = [
        [i for step in range(e * 3, e * 3 + 3) for part in ids(feed, step) for i in part]
        for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    forward = Feed(documents(*[2] * 10), batch=2, accumulation=1, seed=1)
    jumping = Feed(documents(*[2] * 10), batch=2, accumulation=1, seed=1)
    steps = [ids(forward, step) for step in range(12)]

    assert ids(jumping, 11) == steps[11]
    assert ids(jumping, 3) == steps[3]
    assert ids(Feed(documents(*[2] * 10), batch=2, accumulation=1, seed=2), 0) != steps[0]


def test_packs_are_full_and_hold_every_document_once() -> None:
    rows = documents(*[7, 3, 3, 4, 10, 1, 2, 6, 5, 9])
    packs = pack(rows, 10)

    assert sorted(d.token_ids[0] for part in packs for d in part) == list(range(10))
    assert all(sum(len(d.token_ids) for d in part) <= 10 for part in packs)
    assert len(packs) == 5  # 50 tokens in packs of 10


def test_a_packed_feed_counts_packs() -> None:
    feed = Feed(documents(*[5] * 8), batch=2, accumulation=1, seed=0, pack_length=10)

    assert (feed.num_units, feed.steps_per_epoch) == (4, 2)
    assert [len(part) for part in feed.passes(0)] == [4]
