"""The skill scheduler in vLLM's real engine, with toy models, and with skills real or made up."""

import random

import pytest

pytest.importorskip("vllm.v1.core.sched.scheduler")

import ahead
import scheduler_worker
import soak
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

SKILLS = ("sql", "french", "go", "law")


SERVER = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""The engine runs in this process, where its scheduler and its worker can be looked at."""


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVER.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return folder


class Engine:
    """An engine in this process, driven by hand."""

    def __init__(self, model, *, skills, **options):
        ours = {
            "scheduler_cls": "hotgraft.serve.vllm.scheduler.SkillScheduler",
            "worker_cls": "scheduler_worker.FakeSkillWorker",
        }
        options = {**ours, **options} if skills else options
        self.llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=256,
            max_num_seqs=32,
            block_size=32,
            seed=0,
            **options,
        )
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        for skill in SKILLS if skills else ():
            self.scheduler.set_skill(skill, skill.encode().hex())

    def serve(self, requests, *, abort=(), at=-1):
        """Generate for (name, skill, prompt, count); abort some after so many steps.

        Returns the tokens of each, why each ended, and the steps.
        """
        scheduler_worker.SEEN.clear()
        names = {}
        for name, skill, prompt, count in requests:
            params = SamplingParams(
                max_tokens=count,
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                extra_args={"hotgraft_skill": skill} if skill else None,
            )
            names[name] = self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        got, ended, steps = {}, {}, 0
        while self.engine.has_unfinished_requests():
            if steps == at:
                self.engine.abort_request(list(abort))
            for output in self.engine.step():
                got[output.request_id] = list(output.outputs[0].token_ids)
                if output.finished:
                    ended[output.request_id] = output.outputs[0]
            steps += 1
        return got, ended, list(scheduler_worker.SEEN)


def requests(rng, count, skills, longest=60):
    return [
        (
            f"r{i}",
            skills[i % len(skills)],
            [rng.randrange(256) for _ in range(rng.randrange(1, longest))],
            rng.randrange(8, 40),
        )
        for i in range(count)
    ]


def one_skill_at_a_time(engine, wanted):
    """What servers that only ever have one skill give, with their steps."""
    got, steps = {}, {}
    for skill in {skill for _, skill, _, _ in wanted}:
        tokens, _, seen = engine.serve([each for each in wanted if each[1] == skill])
        got |= tokens
        steps[skill] = [counts for _, _, counts in seen]
        assert {live for _, live, _ in seen} == {skill}
    return got, steps


@pytest.fixture(scope="module")
def roomy(model):
    return Engine(
        model, skills=True, additional_config={"hotgraft": {"quantum": 3, "max_wait": 60}}
    )


def test_the_skills_differ(roomy):
    got = [roomy.serve([("r", skill, [1, 2, 3], 16)])[0]["r"] for skill in (None, *SKILLS)]
    assert len({tuple(tokens) for tokens in got}) == 5


@pytest.mark.parametrize("skills", [SKILLS, (None, *SKILLS)], ids=["skills", "skills and base"])
def test_mixed_traffic_gets_the_steps_and_tokens_of_one_skill_servers(roomy, skills):
    """16 requests of 4 skills: no step is mixed, and each skill's steps are a lone server's."""
    wanted = requests(random.Random(1), 16, skills)
    alone, steps = one_skill_at_a_time(roomy, wanted)
    roomy.scheduler.reset_prefix_cache()
    got, _, seen = roomy.serve(wanted)
    skill_of = {name: skill for name, skill, _, _ in wanted}
    for named, live, counts in seen:
        assert named == live
        assert {skill_of[name] for name in counts} == {live}
    for skill in skills:
        assert [counts for _, live, counts in seen if live == skill] == steps[skill]
    assert got == alone
    assert roomy.scheduler.counters.switches >= 2 * len(skills)


def test_aborts_of_running_and_hidden_requests_disturb_nobody(roomy):
    wanted = requests(random.Random(2), 16, SKILLS)
    alone, _ = one_skill_at_a_time(roomy, wanted)
    roomy.scheduler.reset_prefix_cache()
    gone = {"r0", "r1", "r2", "r7"}
    got, ended, _ = roomy.serve(wanted, abort=gone, at=8)
    assert ended.keys() == alone.keys() - gone
    for name, tokens in got.items():
        assert tokens == (alone[name][: len(tokens)] if name in gone else alone[name])


def test_prefixes_are_shared_within_skills_only(roomy):
    roomy.scheduler.reset_prefix_cache()
    prompt = [random.Random(3).randrange(256) for _ in range(100)]
    first = {}
    for round_ in range(2):
        for skill in (None, *SKILLS):
            got, _, seen = roomy.serve([(f"p{round_}", skill, prompt, 12)])
            count = seen[0][2][f"p{round_}"]
            assert count == (100 if round_ == 0 else 100 - 96)
            assert first.setdefault(skill, got[f"p{round_}"]) == got[f"p{round_}"]


def test_an_unknown_skill_is_an_error_for_its_client_alone(roomy):
    wanted = requests(random.Random(4), 8, SKILLS)
    alone, _ = one_skill_at_a_time(roomy, wanted)
    got, ended, _ = roomy.serve([*wanted, ("lost", "poetry", [1], 8)])
    assert ended["lost"].finish_reason == "error"
    assert "no skill 'poetry' is there" in ended["lost"].stop_reason
    assert {name: got[name] for name in alone} == alone


NARROW = {
    "num_gpu_blocks_override": 14,
    "max_num_batched_tokens": 48,
    "long_prefill_token_threshold": 20,
    "enable_prefix_caching": False,
}
"""Little memory, and steps of few tokens: prefills come in chunks, and blocks are taken."""
RULES = {"hotgraft": {"quantum": 2, "max_wait": 60}}


@pytest.fixture(scope="module")
def narrow(model):
    return Engine(model, skills=True, additional_config=RULES, **NARROW)


@pytest.fixture(scope="module")
def crowd(narrow):
    """Requests, and what each gets alone, of a model shown to give the same in any batch."""
    wanted = [
        (name, skill, prompt * 2, count + 40)
        for name, skill, prompt, count in requests(random.Random(5), 12, SKILLS)
    ]
    alone = {}
    for each in wanted:
        alone |= narrow.serve([each])[0]
    together, _ = one_skill_at_a_time(narrow, wanted)
    assert together == alone, "this model's tokens depend on the batch"
    return wanted, alone


def test_hidden_requests_lose_their_blocks_and_nothing_else(narrow, crowd):
    wanted, alone = crowd
    before = narrow.scheduler.counters.evictions
    got, ended, seen = narrow.serve(wanted)
    assert got == alone
    assert len(ended) == 12
    assert narrow.scheduler.counters.evictions > before
    largest = max(n for _, _, counts in seen for n in counts.values())
    assert largest <= 48 < max(len(prompt) for _, _, prompt, _ in wanted)  # in chunks


def test_steps_that_are_planned_ahead_give_the_same_tokens(model, crowd, monkeypatch):
    """vLLM's loop, scheduler and runner as on GPUs: a step is planned when no output is in."""
    wanted, alone = crowd
    with ahead.allowed(monkeypatch):
        scheduler = "hotgraft.serve.vllm.scheduler.AsyncSkillScheduler"
        engine = Engine(
            model, skills=True, scheduler_cls=scheduler, additional_config=RULES, **NARROW
        )
        assert engine.engine.engine_core.engine_core.batch_queue_size == 2
        got, ended, seen = engine.serve(wanted)
        assert got == alone
        assert len(ended) == 12
        assert all(named == live for named, live, _ in seen)
        counters = engine.scheduler.counters
        assert min(counters.evictions, counters.switches) > 0
        gone = {"r0", "r1", "r2", "r7"}
        got, ended, _ = engine.serve(wanted, abort=gone, at=30)
        assert ended.keys() == alone.keys() - gone
        for name, tokens in got.items():
            assert tokens == (alone[name][: len(tokens)] if name in gone else alone[name])


def test_traffic_without_skills_is_plain_vllm(model, narrow):
    """The same tokens in the same number of steps, short of memory."""
    worker = "scheduler_worker.FakeSkillWorker"
    plain = Engine(model, skills=False, worker_cls=worker, **NARROW)
    wanted = requests(random.Random(6), 16, (None,))
    theirs, _, plain_steps = plain.serve(wanted)
    ours, _, steps = narrow.serve(wanted)
    assert ours == theirs
    assert [counts for _, _, counts in steps] == [counts for _, _, counts in plain_steps]
    assert {live for _, live, _ in steps[1:]} == {None}


def test_switches_under_load_give_what_servers_of_one_skill_give(tmp_path):
    """Real skills in a real worker, and vLLM alone on their checkpoints as the judge."""
    base = soak.save_base(tmp_path / "base", "bfloat16")
    found = soak.soak(base, 2, 200, invariant=False)
    assert found["switches"] >= 200
    assert min(found["evictions"], found["aborted"]) > 0
