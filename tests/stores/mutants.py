"""Bugs that are planted in the idempotency machine, one at a time, to see whether `model.py` notices.

Each is written twice: as a changed rule of `core/idempotency.py`, or a wrong sum, for SQLite, and as a changed line of
Lua, for Redis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from serve_app.core import caps
from serve_app.core import idempotency as machine
from serve_app.core.idempotency import Abandon, Begin, ClaimStep, Complete, Decision, Renew, Rule, Situation, State
from serve_app.core.ledger import UsageEvent
from serve_app.stores import redis_client, redis_scripts, sqlite
from tests.stores.homes import Home
from tests.stores.ledger import BrokenPromise
from tests.stores.model import explore

EXAMPLES, STEPS = 400, 30  # at most: the first that breaks a promise is the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    name: str
    rules: Sequence[Rule]
    script: str  # the name in `redis_scripts.py`
    line: str
    instead: str
    picos: Callable[[UsageEvent], int] = caps.picos  # what SQLite counts for a bill


def caught(mutant: Mutant, home: Home, *, seed: int) -> str | None:
    """The promise that it was seen to break; None: it survived."""
    with _planted(mutant):
        try:
            explore(home, examples=EXAMPLES, steps=STEPS, seed=seed, quiet=True)
        except BrokenPromise as broken:
            return str(broken)
    return None


@contextmanager
def _planted(mutant: Mutant) -> Iterator[None]:
    script: redis_scripts.Script = getattr(redis_scripts, mutant.script)
    assert script.text.count(mutant.line) == 1, f"{mutant.name}: the line to be replaced is not in {mutant.script}"
    bad = redis_scripts.Script(script.text.replace(mutant.line, mutant.instead))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "RULES", mutant.rules)
        patch.setattr(sqlite, "picos", mutant.picos)
        patch.setattr(redis_scripts, mutant.script, bad)
        patch.setattr(redis_client, "SCRIPTS", [bad if it is script else it for it in redis_scripts.SCRIPTS])
        yield


def _but(state: State, step: type[ClaimStep], rule_when: machine.Condition, **change: Any) -> list[Rule]:
    """The table with one rule changed."""
    rules = [it for it in machine.RULES if (it.state, it.step, it.when) == (state, step, rule_when)]
    assert len(rules) == 1, f"no such rule: {state}, {step.__name__}, {rule_when.__name__}"
    return [replace(it, **change) if it is rules[0] else it for it in machine.RULES]


def _never(_: Situation) -> bool:
    return False


def _then(action: machine.Action, change: Callable[[Situation, Decision], Decision]) -> machine.Action:
    return lambda at: change(at, action(at))


def _kept_for(at: Situation, done: Decision, ms: int) -> Decision:
    assert done.record is not None
    return replace(done, record=replace(done.record, expires_ms=at.now_ms + ms))


def _under_a_new_op(at: Situation, taken: Decision) -> Decision:
    assert isinstance(at.step, Begin)
    assert taken.record is not None
    assert isinstance(taken.outcome, machine.Proceed)
    op = at.step.op
    return replace(taken, record=replace(taken.record, op=op), outcome=replace(taken.outcome, op=op))


def _billed_again(at: Situation, replayed: Decision) -> Decision:
    assert isinstance(at.step, Complete)
    assert at.step.event is not None
    return replace(replayed, event=replace(at.step.event, id=f"{at.step.event.id}-again"))  # an id is written once


def _billed_all_the_same(at: Situation, capped: Decision) -> Decision:
    assert isinstance(at.step, Complete)
    return replace(capped, event=at.step.event)


def _still_reserved(at: Situation, done: Decision) -> Decision:
    assert at.record is not None
    assert done.record is not None
    return replace(done, record=replace(done.record, bytes=at.record.bytes))


RUNNING, DONE = State.RUNNING, State.DONE
_FINISHED = (RUNNING, Complete, machine.same_op)

MUTANTS = (
    Mutant(
        name="a takeover makes a new op",
        rules=_but(RUNNING, Begin, machine.lease_lapsed, then=_then(machine.take_over, _under_a_new_op)),
        script="BEGIN",
        line="if found.lease_ms <= now then",
        instead="if found.lease_ms <= now then\n  found.op = op\n  redis.call('HSET', record, 'op', op)",
    ),
    Mutant(
        name="a live lease is taken over",
        rules=_but(RUNNING, Begin, machine.lease_lapsed, when=machine.always),
        script="BEGIN",
        line="if found.lease_ms <= now then",
        instead="if true then",
    ),
    Mutant(
        name="a lease never lapses",
        rules=_but(RUNNING, Begin, machine.lease_lapsed, when=_never),
        script="BEGIN",
        line="if found.lease_ms <= now then",
        instead="if false then",
    ),
    Mutant(
        name="an attempt waits for itself",
        rules=_but(RUNNING, Begin, machine.same_attempt, when=_never),
        script="BEGIN",
        line="if found.attempt == attempt then",
        instead="if false then",
    ),
    Mutant(
        name="the fingerprint of what is done is not compared",
        rules=_but(DONE, Begin, machine.other_request, when=_never),
        script="BEGIN",
        line="if found.fingerprint ~= fingerprint then",
        instead="if not found.done and found.fingerprint ~= fingerprint then",
    ),
    Mutant(
        name="the fingerprint of what runs is not compared",
        rules=_but(RUNNING, Begin, machine.other_request, when=_never),
        script="BEGIN",
        line="if found.fingerprint ~= fingerprint then",
        instead="if found.done and found.fingerprint ~= fingerprint then",
    ),
    Mutant(
        name="a quota stops nobody",
        rules=_but(State.FREE, Begin, machine.over_quota, when=_never),
        script="BEGIN",
        line="local fits = ",
        instead="local fits = true or ",
    ),
    Mutant(
        name="anybody renews",
        rules=_but(RUNNING, Renew, machine.always, then=machine.extend),
        script="RENEW",
        line="if found.attempt ~= ARGV[4] then return {'fenced'} end",
        instead="",
    ),
    Mutant(
        name="a second success overwrites the first",
        rules=_but(DONE, Complete, machine.same_op, then=machine.finish),
        script="COMPLETE",
        line="if found.done then return replay(found) end",
        instead="",
    ),
    Mutant(
        name="any operation completes a key",
        rules=_but(*_FINISHED, when=machine.always),
        script="COMPLETE",
        line="if not found or found.op ~= ARGV[4] then",
        instead="if not found or (found.done and found.op ~= ARGV[4]) then",
    ),
    Mutant(
        name="a replay is billed",
        rules=_but(DONE, Complete, machine.same_op, then=_then(machine.replay, _billed_again)),
        script="COMPLETE",
        line="if found.done then return replay(found) end",
        instead="if found.done then append(9) return replay(found) end",
    ),
    Mutant(
        name="a success is not billed",
        rules=_but(*_FINISHED, then=_then(machine.finish, lambda _, done: replace(done, event=None))),
        script="COMPLETE",
        line="if ARGV[9] then append(9) end",
        instead="",
    ),
    Mutant(
        name="a reply is forgotten with its run",
        rules=_but(*_FINISHED, then=_then(machine.finish, lambda at, done: _kept_for(at, done, machine.RUNNING_MS))),
        script="COMPLETE",
        line="keep(workspace, claim, now + KEPT_MS)",
        instead="keep(workspace, claim, now + RUNNING_MS)",
    ),
    Mutant(
        name="a reply is forgotten a millisecond early",
        rules=_but(
            *_FINISHED,
            then=_then(machine.finish, lambda at, done: _kept_for(at, done, machine.REPLAY_MS + machine.GRACE_MS - 1)),
        ),
        script="COMPLETE",
        line="keep(workspace, claim, now + KEPT_MS)",
        instead="keep(workspace, claim, now + KEPT_MS - 1)",
    ),
    Mutant(
        name="the cap stops nobody",
        rules=_but(RUNNING, Complete, machine.over_cap, when=_never),
        script="COMPLETE",
        line="if ARGV[9] and is_capped(9) then",
        instead="if false then",
    ),
    Mutant(
        name="a capped call keeps its key",
        rules=_but(
            RUNNING, Complete, machine.over_cap, then=_then(machine.cap, lambda at, it: replace(it, record=at.record))
        ),
        script="COMPLETE",
        line="drop(workspace, claim)\n  return {'capped'}",
        instead="return {'capped'}",
    ),
    Mutant(
        name="a capped call is billed",
        rules=_but(RUNNING, Complete, machine.over_cap, then=_then(machine.cap, _billed_all_the_same)),
        script="COMPLETE",
        line="drop(workspace, claim)\n  return {'capped'}",
        instead="drop(workspace, claim)\n  append(9)\n  return {'capped'}",
    ),
    Mutant(
        name="a bill is counted twice against the cap",
        rules=machine.RULES,
        script="COMPLETE",
        line="spend(month_of(at), ARGV[at + 5], ARGV[at + 6])",
        instead="for _ = 1, 2 do spend(month_of(at), ARGV[at + 5], ARGV[at + 6]) end",
        picos=lambda event: 2 * caps.picos(event),
    ),
    Mutant(
        name="what was reserved stays reserved",
        rules=_but(*_FINISHED, then=_then(machine.finish, _still_reserved)),
        script="COMPLETE",
        line="count(workspace, claim, bytes)\nreturn",
        instead="return",
    ),
    Mutant(
        name="a success can be abandoned",
        rules=[
            *_but(DONE, Abandon, machine.always, when=machine.same_attempt, then=machine.free),
            Rule(state=DONE, step=Abandon, when=machine.always, then=machine.ignore, to=DONE),
        ],
        script="ABANDON",
        line="if not found or found.done or",
        instead="if not found or",
    ),
    Mutant(
        name="anybody abandons",
        rules=_but(RUNNING, Abandon, machine.always, then=machine.free),
        script="ABANDON",
        line="if not found or found.done or found.attempt ~= ARGV[4] then",
        instead="if not found or found.done then",
    ),
)
