"""Who gives way: which running sequences stop and wait, so that another's tenant gets its share.

A share is what a tenant's running sequences hold of something (places, blocks, seats) over its
weight. Knows counts and turns; neither preempts nor frees. Invariants: nobody claims anything from
a tenant that has been served less, nor so much that it then holds more than the other keeps; and a
sequence that gave way does so again only after `MIN_TOKENS` more tokens, so all come to their end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from itertools import chain

from loriner.core import Sequence
from loriner.engine.fairness import Turns

MIN_TOKENS = 16  # between two times that one sequence gives way to other tenants

Holds = Callable[[Sequence], int]


def of_place(sequence: Sequence) -> int:
    return 1


def who_grew_most(running: Iterable[Sequence], turns: Turns) -> Sequence:
    """Who must go when a running sequence needs a block and there is none: of the tenant with the
    largest share of blocks the least urgent, of those the latest admitted."""
    running = list(running)
    held = _held(running, _num_blocks)
    return max(reversed(running), key=lambda one: _rank(one, held, turns))


def claim(
    claimant: Sequence,
    running: Iterable[Sequence],
    turns: Turns,
    holds: Holds,
    wanted: int,
    missing: int,
) -> list[Sequence] | None:
    """Who gives way so that `missing` of the `wanted` things that `claimant` needs fall free; None
    when it has to wait. A tenant's latest admitted go first, the least urgent before them."""
    running = list(running)
    held, mine = _held(running, holds), claimant.request.salt
    share = (held[mine] + wanted) / turns.weight(mine)
    left = [one for one in reversed(running) if _may_give_way(one, claimant, turns)]
    victims: list[Sequence] = []
    while missing > 0:
        left = [one for one in left if _share(one, held, turns, holds(one)) >= share]
        if not left:
            return None
        victim = max(left, key=lambda one: _rank(one, held, turns))
        left.remove(victim)
        victims.append(victim)
        held[victim.request.salt] -= holds(victim)
        missing -= holds(victim)
    return victims


def claim_seat(
    claimant: Sequence, running: Iterable[Sequence], turns: Turns, kept: AbstractSet[str]
) -> list[Sequence]:
    """All that run on one adapter of a tenant with a larger share of seats, the fewest there are;
    nobody when `claimant` has to wait. The `kept` adapters stay."""
    users: defaultdict[str, list[Sequence]] = defaultdict(list)
    for one in running:
        if one.generation is not None:
            users[one.generation].append(one)
    tenants = ({one.request.salt for one in those} for those in users.values())
    held = Counter(chain.from_iterable(tenants))  # adapters that each tenant runs on
    mine = claimant.request.salt
    share = (held[mine] + 1) / turns.weight(mine)
    able = [
        those
        for generation, those in users.items()
        if generation not in kept
        and all(_may_give_way(one, claimant, turns) for one in those)
        and all(_share(one, held, turns, 1) >= share for one in those)
    ]
    return min(able, key=len, default=[])


def _may_give_way(one: Sequence, claimant: Sequence, turns: Turns) -> bool:
    """Not to its own tenant, nor to one that was served more, nor again so soon."""
    owner, claiming = one.request.salt, claimant.request.salt
    if owner == claiming or turns.served(claiming) > turns.served(owner):
        return False
    return not one.num_preemptions or len(one.token_ids) - one.num_when_preempted >= MIN_TOKENS


def _held(running: Iterable[Sequence], holds: Holds) -> Counter[str]:
    """What each tenant holds in all."""
    held: Counter[str] = Counter()
    for one in running:
        held[one.request.salt] += holds(one)
    return held


def _num_blocks(sequence: Sequence) -> int:
    return len(sequence.blocks)


def _share(one: Sequence, held: Counter[str], turns: Turns, less: int = 0) -> float:
    """Of its tenant, with `less` than it holds."""
    tenant = one.request.salt
    return (held[tenant] - less) / turns.weight(tenant)


def _rank(one: Sequence, held: Counter[str], turns: Turns) -> tuple[float, int]:
    """The largest goes first: of the largest share, then the least urgent."""
    return _share(one, held, turns), one.request.turn.priority
