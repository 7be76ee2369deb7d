"""The skill scheduler, judged by a worker that checks every step (no model)."""

import itertools
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.v1.core.sched.scheduler")

from hotgraft.errors import HotgraftError, SkillInUseError, UnknownSkillError
from hotgraft.serve.vllm.scheduler import AsyncSkillScheduler, SkillScheduler
from scheduler_toys import BLOCK, Server, alone, config
from transformers import LlamaConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

SKILLS = ("sql", "french", "go", "law")
ANYONE = (None, *SKILLS)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    made = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=256)
    made.architectures = ["LlamaForCausalLM"]
    made.save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def server(request, model):
    """Makes servers, and looks at each when it is done: nothing is left in its books."""
    made = []

    def make(**options):
        options.setdefault("asynchronous", request.param)
        scheduler = AsyncSkillScheduler if options["asynchronous"] else SkillScheduler
        made.append(Server(scheduler, config(model, **options), SKILLS))
        return made[-1]

    yield make
    for each in made:
        it = each.scheduler
        if it.has_requests():
            continue
        each.step()
        assert (
            it.kv_cache_manager.block_pool.get_num_free_blocks()
            == it.kv_cache_config.num_blocks - 1
        )
        assert not it._members, it._members
        assert not it._barrier()
        assert not it._turns._line
        assert not it.waiting._parts
        assert not it.kv_holding_waiting._parts
        assert not it.running


def prompt(rng, longest=20, letters=3):
    """Of few letters, so that prefixes are shared."""
    return [rng.randrange(letters) for _ in range(rng.randrange(1, longest))]


SETUPS = {
    "roomy": {"blocks": 400},
    "short of memory": {"blocks": 24},
    "hardly any memory": {"blocks": 18},
    "few slots": {"blocks": 400, "max_num_seqs": 3},
    "chunked": {"blocks": 60, "max_num_batched_tokens": 16, "long_prefill_token_threshold": 5},
    "by priority": {"blocks": 24, "policy": "priority"},
    "by priority, few slots": {"blocks": 24, "policy": "priority", "max_num_seqs": 3},
    "no prefixes": {"blocks": 24, "prefix": False},
    "impatient": {"blocks": 24, "rules": {"quantum": 8, "max_wait": 0}},
}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("seed", range(6))
def test_any_traffic_gets_what_each_request_gets_alone(server, setup, seed):
    """Requests come and are aborted at any time; none is lost, mixed up or stuck."""
    rng = random.Random(seed)
    quantum, wait = rng.randrange(1, 9), rng.choice([3, 20, 1000])
    it = server(**{"rules": {"quantum": quantum, "max_wait": wait}, **SETUPS[setup]})
    want, aborted = {}, set()
    for step in range(120):
        while rng.random() < 0.35:
            name, skill = f"r{len(want)}", rng.choice(ANYONE)
            tokens, count = prompt(rng), rng.randrange(1, 40)
            it.add(name, tokens, skill, count, priority=rng.randrange(3))
            want[name] = alone(skill, tokens, count)
        if rng.random() < 0.05 and it.scheduler.requests:
            name = rng.choice(list(it.scheduler.requests))
            it.abort(name)
            aborted.add(name)
        if step % 40 == 39:
            it.scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)
        it.step()
    it.run()
    for name, tokens in want.items():
        got = it.got.get(name, [])
        assert got == (tokens[: len(got)] if name in aborted else tokens), name
        assert name in aborted or it.ended[name] == "length"
    skills = {skill for skill, _ in it.steps}
    assert it.scheduler.counters.steps.keys() == skills
    assert sum(it.scheduler.counters.steps.values()) == len(it.steps)


@pytest.mark.parametrize("skill", [None, "sql"])
@pytest.mark.parametrize(
    "setup", ["roomy", "short of memory", "few slots", "chunked", "by priority"]
)
def test_traffic_of_one_kind_is_scheduled_as_by_vllm(server, model, setup, skill):
    """The base's is untouched; a single skill's is the same but for its hashes."""
    ours = server(**SETUPS[setup])
    scheduler = AsyncScheduler if ours.asynchronous else Scheduler
    theirs = Server(scheduler, config(model, asynchronous=ours.asynchronous, **SETUPS[setup]))
    rng = random.Random(7)
    for i in range(100):
        while rng.random() < 0.4:
            tokens, count, priority = prompt(rng), rng.randrange(1, 30), rng.randrange(3)
            name = f"r{i}-{rng.random()}"
            ours.add(name, tokens, skill, count, priority=priority)
            # The toy's tokens depend on the skill, and nothing else may.
            theirs.add(name, tokens, None, count, priority=priority)
            if skill is None:
                a, b = (each.scheduler.requests[name].block_hashes for each in (ours, theirs))
                assert a == b
        ours.step()
        theirs.step()
    ours.run()
    theirs.run()
    assert [tokens for _, tokens in ours.steps] == [tokens for _, tokens in theirs.steps]
    assert skill is not None or ours.got == theirs.got
    assert ours.scheduler.counters.empty == 0
    assert ours.scheduler.counters.switches == (skill is not None)


# ---- memory and slots --------------------------------------------------------------------------


def test_hidden_requests_that_hold_all_the_memory_give_it_to_older_ones(server):
    """Two skills fill the cache together, and the younger one's blocks go to the older one."""
    it = server(blocks=17, prefix=False, rules={"quantum": 4, "max_wait": 1000})
    old = it.add("old", [1] * 8, "sql", 50)
    young = it.add("young", [2] * 8, "french", 50)
    it.run()
    assert it.got == {"old": alone("sql", [1] * 8, 50), "young": alone("french", [2] * 8, 50)}
    assert old.num_preemptions == 0
    assert young.num_preemptions > 0
    assert it.scheduler.counters.evictions > 0


def test_the_least_urgent_gives_its_memory_hidden_or_not(server):
    it = server(blocks=17, prefix=False, policy="priority", rules={"quantum": 1})
    low = it.add("low", [1] * 8, "sql", 50, priority=9)
    it.step()
    it.step()
    high = it.add("high", [2] * 8, "french", 50, priority=0)
    it.run()
    assert it.got == {"low": alone("sql", [1] * 8, 50), "high": alone("french", [2] * 8, 50)}
    assert high.num_preemptions == 0
    assert low.num_preemptions > 0


def test_the_oldest_never_loses_its_memory_in_any_crowd(server):
    it = server(blocks=18, rules={"quantum": 2, "max_wait": 5})
    first = it.add("first", [1, 2, 3], "law", 55)
    it.step()
    rng = random.Random(3)
    for i in range(30):
        it.add(f"r{i}", prompt(rng), rng.choice(ANYONE), 30)
    it.run()
    assert first.num_preemptions == 0
    assert it.scheduler.counters.evictions > 0
    assert len(it.ended) == 31


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones_of_others(server):
    """It is refused memory; from then on nobody behind it is let in, of whatever skill."""
    it = server(blocks=17, prefix=False, rules={"quantum": 4, "max_wait": 10})
    for i in range(4):
        it.add(f"s{i}", [i] * 4, "sql", 10 + 3 * i)
    it.step()
    it.add("large", [9] * 48, "french", 4)
    for i in range(200):
        it.add(f"t{i}", [i] * 4, "sql", 8)
        it.step()
        if "large" in it.ended:
            break
    assert it.got["large"] == alone("french", [9] * 48, 4)
    assert i < 60
    it.run()


def test_hidden_requests_take_up_slots(server):
    it = server(max_num_seqs=3, rules={"quantum": 1, "max_wait": 2})
    for i, skill in enumerate(ANYONE):
        it.add(f"r{i}", [i], skill, 12)
        it.add(f"q{i}", [i], skill, 12)
    seen = 0
    while it.scheduler.has_requests():
        it.step()
        seen = max(seen, len(it.scheduler.running))  # `step` checks that there are not more
    assert seen == 3
    it.run()
    assert len(it.ended) == 10
    assert all(it.got[f"r{i}"] == alone(skill, [i], 12) for i, skill in enumerate(ANYONE))


def test_a_burst_of_one_skill_takes_no_slots_of_those_before_it(server):
    """With four slots the first four are let in, though all of the first skill's could be."""
    it = server(max_num_seqs=4, rules={"quantum": 3, "max_wait": 1000})
    for i in range(20):
        it.add(f"r{i}", [i], SKILLS[i % 4], 20 if i < 4 else 5)
    while len(it.scheduler.running) < 4:
        it.step()
    assert {r.request_id for r in it.scheduler.running} == {"r0", "r1", "r2", "r3"}
    it.run()
    assert all(it.got[f"r{i}"] == alone(SKILLS[i % 4], [i], 20 if i < 4 else 5) for i in range(20))


# ---- turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantum", "wait"), [(1, 1000), (5, 1000), (8, 6), (20, 15)])
def test_waits_keep_to_the_bounds_and_turns_to_the_quantum(server, quantum, wait):
    it = server(blocks=1000, rules={"quantum": quantum, "max_wait": wait})
    for i in range(16):
        it.add(f"r{i}", [i], SKILLS[i % 4], 40)
    it.run()
    steps = [skill for skill, _ in it.steps]
    turns = [0]
    for before, skill in itertools.pairwise(steps):
        if skill == before:
            turns[-1] += 1
        else:
            turns.append(0)
    assert max(turns[:-4]) < quantum
    # Time is counted in steps; all of them are one long.
    bound = min(3 * quantum + 1, wait + 3)
    assert it.scheduler.counters.longest_wait <= bound
    assert it.scheduler.counters.switches == len(turns)
    assert sum(it.scheduler.counters.waits) == len(turns)


def test_requests_of_one_skill_share_steps(server):
    it = server(blocks=1000, rules={"quantum": 4, "max_wait": 100})
    for i in range(16):
        it.add(f"r{i}", [i], SKILLS[i % 4], 8)
    it.run()
    assert len(it.steps) == 4 * 8  # a step of four requests is one step
    assert all(len(tokens) == 4 for _, tokens in it.steps)


# ---- prefixes ----------------------------------------------------------------------------------


def hits(it, *requests, shared=(7,) * 12):
    """How many tokens of the last request's prompt were found in the cache."""
    for i, (skill, salt) in enumerate(requests):
        it.add(f"p{i}", shared, skill, 2, salt=salt)
        it.run()
    first = next(tokens[f"p{i}"] for _, tokens in it.steps if f"p{i}" in tokens)
    return len(shared) - first


def test_prefixes_are_shared_within_a_skill(server):
    assert hits(server(), ("sql", None), ("sql", None)) == 2 * BLOCK
    assert hits(server(), ("sql", "me"), ("sql", "me")) == 2 * BLOCK
    assert hits(server(), (None, None), (None, None)) == 2 * BLOCK
    assert hits(server(), (None, "hotgraft me"), (None, "hotgraft me")) == 2 * BLOCK


def test_prefixes_are_not_shared_between_skills_or_salts(server):
    assert hits(server(), ("sql", None), ("french", None)) == 0
    assert hits(server(), ("sql", None), (None, None)) == 0
    assert hits(server(), (None, None), ("sql", None)) == 0
    assert hits(server(), ("sql", "me"), ("sql", "you")) == 0


def test_no_client_of_the_base_can_ask_for_a_skills_prefixes(server):
    it = server()
    salt = it.add("spy", [1], "sql", 1).cache_salt
    assert hits(it, ("sql", None), (None, salt)) == 0
    assert hits(server(), (None, "hotgraft x"), (None, "hotgraft base hotgraft x")) == 0


def test_names_of_the_same_weights_share_prefixes(server):
    it = server()
    it.scheduler.set_skill("alias", it.scheduler.skills["sql"])
    requests = [it.add(skill, [7] * 12, skill, 2) for skill in ("sql", "alias")]
    assert requests[0].block_hashes == requests[1].block_hashes
    it.abort("sql", "alias")


def test_encoder_outputs_are_keyed_by_skill(server):
    it = server()
    features = [SimpleNamespace(identifier="image") for _ in range(3)]
    for feature, skill in zip(features, (None, "sql", "french"), strict=True):
        request = SimpleNamespace(
            cache_salt=None, mm_features=[feature], block_hashes=[], update_block_hashes=list
        )
        it.scheduler._keep_apart(request, it.scheduler.skills[skill] if skill else None)
    assert features[0].identifier == "image"
    assert len({feature.identifier for feature in features}) == 3


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skill", "reason"),
    [("poetry", "no skill 'poetry' is there; there are: french, go, law, sql"), (7, "is 7; it is")],
)
@pytest.mark.parametrize("busy", [False, True])
def test_a_request_for_no_skill_is_finished_with_an_error_alone(server, skill, reason, busy):
    it = server()
    if busy:
        it.add("other", [1], "sql", 9)
        it.step()
    it.add("lost", [1, 2], skill, 9)
    assert it.scheduler.has_requests()
    it.run()
    assert it.ended["lost"] == "error"
    assert reason in it.reasons["lost"]
    assert it.got["lost"] == []
    assert it.scheduler.counters.refusals == 1
    assert not busy or it.got["other"] == alone("sql", [1], 9)


def test_a_request_for_other_weights_of_that_name_is_finished_with_an_error(server):
    it = server()
    for digest in ("ab", it.scheduler.skills["sql"], None):
        it.add(f"r{digest}", [1, 2], "sql", digest=digest)
    it.run()
    assert it.ended.pop("rab") == "error"
    assert set(it.ended.values()) == {"length"}
    assert "replaced while the request came" in it.reasons["rab"]


def test_an_empty_name_is_the_base(server):
    it = server()
    it.add("plain", [1], "", 3)
    it.run()
    assert it.got["plain"] == alone(None, [1], 3)


def test_a_skill_in_use_is_not_dropped_or_replaced(server):
    it = server()
    it.add("r", [1], "sql", 9)
    it.step()
    with pytest.raises(SkillInUseError, match="skill 'sql' has 1 unfinished requests; wait"):
        it.scheduler.drop_skill("sql")
    with pytest.raises(SkillInUseError, match="unfinished"):
        it.scheduler.set_skill("sql", "ab")
    it.scheduler.set_skill("sql", it.scheduler.skills["sql"])
    it.run()
    assert it.scheduler.drop_skill("sql") == 0
    it.add("late", [1], "sql", 9)
    it.run()
    assert it.ended["late"] == "error"


def test_dropping_with_abort_ends_its_requests_and_no_others(server):
    it = server(rules={"quantum": 2})
    for i in range(3):
        it.add(f"sql{i}", [i], "sql", 30)
        it.add(f"go{i}", [i], "go", 30)
    for _ in range(6):
        it.step()
    assert it.scheduler.drop_skill("sql", abort=True) == 3
    assert it.scheduler.unfinished("sql") == 0
    it.run()
    for i in range(3):
        assert it.ended[f"sql{i}"] == "error"
        assert it.reasons[f"sql{i}"] == "skill 'sql' was dropped"
        assert it.got[f"go{i}"] == alone("go", [i], 30)


@pytest.mark.parametrize(
    ("name", "digest"), [("", "ab"), (None, "ab"), ("sql2", ""), ("sql2", "AB"), ("sql2", None)]
)
def test_skills_have_names_and_digests(server, name, digest):
    with pytest.raises(HotgraftError, match=r"a skill is called|has the digest"):
        server().scheduler.set_skill(name, digest)


def test_unknown_skills_are_not_dropped(server):
    with pytest.raises(UnknownSkillError, match="no skill 'poetry' is there"):
        server().scheduler.drop_skill("poetry")


@pytest.mark.parametrize("rules", [{"quantum": 0}, {"max_wait": "long"}, [1]])
def test_wrong_rules_are_refused_at_start(server, rules):
    with pytest.raises(HotgraftError, match=r"quantum|max_wait|mapping"):
        server(rules=rules)


# ---- what else vLLM does -----------------------------------------------------------------------


def test_hidden_requests_are_aborted_wherever_they_are(server):
    it = server(max_num_seqs=2, rules={"quantum": 3, "max_wait": 1000})
    it.add("one", [1], "sql", 40)
    it.add("two", [2], "french", 40)
    it.add("queued", [3], "go", 40)
    it.add("last", [4], "law", 5)
    while len(it.scheduler.running) < 2 or len(it.got.get("two", ())) < 4:
        it.step()
    hidden, shown = ("one", "two") if it.scheduler._turns.live == "french" else ("two", "one")
    assert it.scheduler.requests[hidden].status == RequestStatus.RUNNING
    assert it.scheduler.requests["queued"].status == RequestStatus.WAITING
    it.abort(hidden, "queued")
    it.add("new", [5], "go", 3)
    it.run()
    assert it.ended.keys() == {shown, "last", "new"}
    skill, tokens = ("sql", [1]) if shown == "one" else ("french", [2])
    assert it.got[shown] == alone(skill, tokens, 40)
    assert it.got["last"] == alone("law", [4], 5)
    assert it.got["new"] == alone("go", [5], 3)


@pytest.mark.parametrize("state", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
def test_a_paused_server_starts_nothing(server, state):
    it = server(rules={"quantum": 1})
    it.add("r", [1], "sql", 9)
    it.step()
    it.step()
    it.scheduler.set_pause_state(state)
    it.add("new", [1], "go", 9)
    for _ in range(20):
        it.step()
    assert "new" not in it.got
    assert ("r" in it.ended) == (state == PauseState.PAUSED_NEW)
    it.scheduler.set_pause_state(PauseState.UNPAUSED)
    it.run()
    assert it.got["new"] == alone("go", [1], 9)
    assert it.got["r"] == alone("sql", [1], 9)


def test_a_session_goes_on_with_its_skill_and_no_other(server):
    it = server(rules={"quantum": 2})
    it.add("other", [5], "go", 60)
    it.add("talk", [1, 2], "sql", 4, resumable=True)
    for _ in range(30):
        it.step()
    assert it.got["talk"] == alone("sql", [1, 2], 4)
    it.add("talk", [3], "sql", 4, resumable=True)
    for _ in range(20):
        it.step()
    assert len(it.got["talk"]) == 8
    it.add("talk", [3], "go", 4, resumable=True)
    it.run()
    assert it.got["other"] == alone("go", [5], 60)
    assert it.reasons["talk"] == "a session of skill 'sql' goes on with 'go'"


def test_a_request_that_waits_for_its_grammar_holds_nobody_up(server):
    it = server(rules={"quantum": 2})
    request = it.add("json", [1], "sql", 5)
    slow = SimpleNamespace(grammar=None)
    request.status, request.structured_output_request = (
        RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
        slow,
    )
    it.add("r", [1], "go", 9)
    for _ in range(15):
        it.step()
    assert it.got["r"] == alone("go", [1], 9)
    assert it.scheduler.counters.empty < 10
    it.add("q", [2], "go", 9)
    slow.grammar = object()  # ready; from here on it is like any other
    it.scheduler._can_admit("sql", None)
    request.structured_output_request = None
    request.status = RequestStatus.WAITING
    it.run()
    assert it.got["json"] == alone("sql", [1], 5)


def test_deeper_pipelines_wait_for_tokens_that_vllm_could_not_find(model, monkeypatch):
    """vLLM's first runner finds a request's last token in the step right before, or not at all."""

    def run():
        it = Server(
            AsyncSkillScheduler, config(model, asynchronous=True, rules={"quantum": 1}), SKILLS
        )
        it.ahead = 2
        for i in range(6):
            it.add(f"r{i}", [i], SKILLS[i % 2], 10)
        it.run()
        return it

    it = run()
    assert all(it.got[f"r{i}"] == alone(SKILLS[i % 2], [i], 10) for i in range(6))
    monkeypatch.setattr(SkillScheduler, "_is_out_of_reach", lambda *_: False)
    with pytest.raises(AssertionError):
        run()
