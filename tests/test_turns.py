"""Turns: the line of skills, its bounds, and the rules' errors. Steps: when workers switch."""

import math
from types import SimpleNamespace

import pytest
from hotgraft.errors import HotgraftError
from hotgraft.serve.vllm.steps import SkillSteps
from hotgraft.serve.vllm.turns import Rules, Turns
from hypothesis import given
from hypothesis import strategies as st

NAMES = [None, "sql", "french", "go", "chess", "law"]


class Crowd:
    """Skills that come, go, and are able to run or not, as the script says; each step takes a time.

    A script is a list of steps: what happens to which skill before it, and how long it takes.
    """

    def __init__(self, rules):
        self.turns = Turns(rules)
        self.now = 0.0
        self.ready = set()
        self.steps = []

    def come(self, skill):
        self.ready.add(skill)
        self.turns.join(skill, self.now)

    def go(self, skill):
        self.ready.discard(skill)
        self.turns.leave(skill)

    def step(self, seconds):
        if self.ready:
            skill = self.turns.choose(set(self.ready), self.now)
            assert skill in self.ready
            self.turns.ran(skill, self.now)
            self.steps.append(skill)
        self.now += seconds


scripts = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), max_size=3),
        st.floats(0.0, 5.0),
    ),
    max_size=80,
)
rules = st.builds(Rules, st.integers(1, 6), st.one_of(st.just(math.inf), st.floats(0.0, 30.0)))


@given(rules, scripts)
def test_nobody_waits_longer_than_the_bounds(given_rules, script):
    crowd = Crowd(given_rules)
    waits = {}  # skill: since when and since which step, without having been away
    rivals = {}  # skill: who was there meanwhile
    longest = 0.0
    for changes, seconds in script:
        for skill, come in changes:
            if come:
                crowd.come(skill)
                waits.setdefault(skill, (crowd.now, len(crowd.steps)))
                rivals.setdefault(skill, set())
            else:
                crowd.go(skill)
                waits.pop(skill, None)
                rivals.pop(skill, None)
        for rival in rivals.values():
            rival.update(crowd.ready)
        before = crowd.now
        crowd.step(seconds)
        longest = max(longest, seconds)
        if not crowd.ready:
            continue
        skill = crowd.steps[-1]
        since, step = waits[skill]
        others = len(rivals[skill] - {skill})
        waited = before - since
        assert len(crowd.steps) - 1 - step <= others * given_rules.quantum
        patience = max(given_rules.max_wait, longest)
        assert waited <= patience + others * longest + 1e-6
        waits[skill] = (before, len(crowd.steps))
        rivals[skill] = set(crowd.ready)


@given(rules, scripts)
def test_the_same_happens_every_time(given_rules, script):
    seen = []
    for _ in range(2):
        crowd = Crowd(given_rules)
        for changes, seconds in script:
            for skill, come in changes:
                (crowd.come if come else crowd.go)(skill)
            crowd.step(seconds)
        seen.append(crowd.steps)
    assert seen[0] == seen[1]


@given(rules, st.sampled_from(NAMES), st.lists(st.floats(0.0, 50.0), max_size=40))
def test_one_skill_alone_never_switches(given_rules, skill, times):
    crowd = Crowd(given_rules)
    crowd.come(skill)
    for seconds in times:
        crowd.step(seconds)
    assert set(crowd.steps) <= {skill}


@given(rules, st.integers(2, 6), st.integers(1, 8))
def test_turns_are_whole_and_go_round_where_nobody_is_late(given_rules, count, rounds):
    crowd = Crowd(Rules(given_rules.quantum, math.inf))
    for skill in NAMES[:count]:
        crowd.come(skill)
    for _ in range(rounds * count * given_rules.quantum):
        crowd.step(1.0)
    once = [skill for skill in NAMES[:count] for _ in range(given_rules.quantum)]
    assert crowd.steps == once * rounds


@given(scripts)
def test_without_patience_the_first_in_line_goes_at_each_step(script):
    crowd = Crowd(Rules(quantum=6, max_wait=0))
    for changes, seconds in script:
        for skill, come in changes:
            (crowd.come if come else crowd.go)(skill)
        crowd.step(seconds)
    for skill in NAMES:
        crowd.come(skill)
    for _ in range(12):
        crowd.step(0.0)  # the clock stands still, and still everybody has a step
    assert set(crowd.steps[-6:]) == set(NAMES)


def test_a_late_skill_cuts_a_turn_short():
    turns = Turns(Rules(quantum=100, max_wait=10))
    turns.join("sql", 0.0)
    turns.ran("sql", 0.0)
    turns.join("french", 1.0)
    turns.join("go", 2.0)
    everybody = {"sql", "french", "go"}
    assert turns.choose(everybody, 10.9) == "sql"
    assert turns.choose(everybody, 11.0) == "french"
    assert turns.choose({"sql", "go"}, 13.0) == "go"
    assert turns.ran("sql", 11.0) is None
    assert turns.ran("french", 13.5) == 12.5


def test_steps_that_nobody_waited_for_are_no_part_of_a_turn():
    turns = Turns(Rules(quantum=3))
    turns.join("sql", 0.0)
    for now in range(9):
        turns.ran("sql", float(now))
    turns.join("french", 8.5)
    assert steps(turns, {"sql", "french"}, 8.6, 6) == [
        "sql", "sql", "french", "french", "french", "sql",
    ]  # fmt: skip
    turns.leave("french")
    assert steps(turns, {"sql"}, 8.8, 5) == ["sql"] * 5
    turns.join("french", 8.9)
    assert steps(turns, {"sql", "french"}, 8.9, 3) == ["sql", "sql", "french"]


def steps(turns, ready, now, count):
    """The skills of so many steps, all at one time."""
    found = []
    for _ in range(count):
        found.append(turns.choose(ready, now))
        turns.ran(found[-1], now)
    return found


def test_the_urgent_go_first_while_nobody_is_late():
    turns = Turns(Rules(quantum=1, max_wait=10))
    for skill in ("sql", "french", "go"):
        turns.join(skill, 0.0)
    urgency = {"sql": 5, "french": 1, "go": 1}
    chosen = []
    for now in range(4):
        skill = turns.choose(urgency.keys(), float(now), urgency)
        turns.ran(skill, float(now))
        chosen.append(skill)
    assert chosen == ["french", "go", "french", "go"]
    assert turns.choose(urgency.keys(), 10.0, urgency) == "sql"


def test_who_left_waits_from_when_it_comes_again():
    turns = Turns(Rules(max_wait=1))
    turns.join("sql", 0.0)
    turns.leave("sql")
    turns.join("sql", 5.0)
    assert turns.ran("sql", 5.5) == 0.5


def test_a_forgotten_skill_is_not_live():
    turns = Turns(Rules(quantum=3))
    turns.join("sql", 0.0)
    turns.ran("sql", 0.0)
    assert turns.live == "sql"
    turns.forget("sql")
    assert turns.live is None
    turns.join("french", 1.0)
    turns.join(None, 2.0)
    assert turns.choose({"french", None}, 2.0) == "french"


def test_nobody_can_be_chosen_of_nobody():
    with pytest.raises(ValueError, match="no skill is ready"):
        Turns().choose(set(), 0.0)


@pytest.mark.parametrize("quantum", [0, -1, 1.5, "8", None, True])
def test_a_quantum_is_a_number_of_steps(quantum):
    with pytest.raises(HotgraftError, match=r"quantum is .*; it is a number of steps, 1 or more"):
        Rules(quantum=quantum)


@pytest.mark.parametrize("wait", [-0.1, math.nan, "1", None, False])
def test_a_wait_is_a_number_of_seconds(wait):
    with pytest.raises(HotgraftError, match=r"max_wait is .*; it is a number of seconds"):
        Rules(max_wait=wait)


def test_rules_are_read_from_settings():
    assert Rules.read(None) == Rules()
    assert Rules.read({}) == Rules()
    assert Rules.read({"max_wait": 2, "skills": "folder"}) == Rules(max_wait=2)
    with pytest.raises(HotgraftError, match="give a mapping such as"):
        Rules.read([8, 1.0])


# ---- steps -------------------------------------------------------------------------------------


class Device:
    """What a worker enqueues, in order."""

    def __init__(self):
        self.queue = []

    def execute_model(self, output, note=None):
        self.queue.append(("pass", output.step))
        return note


class Worker(SkillSteps, Device):
    broken = False

    def hotgraft_switch(self, skill):
        if self.broken:
            raise HotgraftError("no room")
        self.queue.append(("switch", skill))


def step(number, tokens=1, **skill):
    return SimpleNamespace(step=number, total_num_scheduled_tokens=tokens, **skill)


def test_a_worker_switches_right_before_a_step_for_another_skill():
    worker = Worker()
    for number, skill in enumerate([None, "sql", "sql", "go", None]):
        worker.execute_model(step(number, hotgraft_skill=skill))
    assert worker.queue == [
        ("pass", 0), ("switch", "sql"), ("pass", 1), ("pass", 2), ("switch", "go"), ("pass", 3),
        ("switch", None), ("pass", 4),
    ]  # fmt: skip
    assert worker.hotgraft_live is None


def test_steps_without_tokens_or_skill_leave_the_weights():
    worker = Worker()
    worker.execute_model(step(0, hotgraft_skill="sql"))
    worker.execute_model(step(1, tokens=0, hotgraft_skill="go"))
    assert worker.execute_model(step(2), note="given on") == "given on"
    assert worker.queue == [("switch", "sql"), ("pass", 0), ("pass", 1), ("pass", 2)]


def test_a_switch_that_fails_runs_no_pass_and_is_tried_again():
    worker = Worker()
    worker.broken = True
    with pytest.raises(HotgraftError, match="no room"):
        worker.execute_model(step(0, hotgraft_skill="sql"))
    assert (worker.queue, worker.hotgraft_live) == ([], None)
    worker.broken = False
    worker.execute_model(step(1, hotgraft_skill="sql"))
    assert worker.queue == [("switch", "sql"), ("pass", 1)]


def test_a_worker_says_how_to_switch():
    class Silent(SkillSteps, Device):
        pass

    with pytest.raises(TypeError, match=r"Silent.*hotgraft_switch"):
        Silent()
