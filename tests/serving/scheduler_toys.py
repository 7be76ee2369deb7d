"""A server without a model: vLLM's real scheduler, and a worker that checks every step it gets.

The worker keeps block tables as vLLM's first model runner does, and a KV cache that holds, for each
slot, which skill wrote which token there. Its model is a hash over the skill and all tokens that it
finds in the cache, so it is batch-invariant, and one token of another request or skill changes all
that follow. `alone` says what a request must get.
"""

import hashlib
import pickle
from collections import deque

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

BLOCK = 4
VOCABULARY = 250


def config(model, *, blocks=64, asynchronous=False, prefix=True, rules=None, **scheduling):
    """What a server is started with; `blocks` are all the KV blocks that there are."""
    made = VllmConfig(
        model_config=ModelConfig(
            model=str(model), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=prefix),
        scheduler_config=SchedulerConfig(
            **{
                "max_model_len": 64,
                "is_encoder_decoder": False,
                "max_num_seqs": 16,
                "max_num_batched_tokens": 64,
                **scheduling,
            }
        ),
        device_config=DeviceConfig("cpu"),
        additional_config={"hotgraft": rules} if rules else {},
    )
    made.scheduler_config.async_scheduling = asynchronous  # a CPU's platform forbids it
    made.cache_config.num_gpu_blocks = blocks
    return made


def token_after(skill, tokens):
    """The model: what follows these tokens."""
    digest = hashlib.sha256(repr((skill, list(tokens))).encode()).digest()
    return digest[0] % VOCABULARY


def alone(skill, prompt, count):
    """What a request gets from a server that only ever had this skill."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(token_after(skill, tokens))
    return tokens[len(prompt) :]


def named(params):
    """The skill that a request asks for."""
    return (params.extra_args or {}).get("hotgraft_skill") or None


class Worker:
    """Runs steps as vLLM's first model runner does, and fails where one could not be run."""

    def __init__(self, *, asynchronous):
        self.asynchronous = asynchronous
        self.cache = {}  # (block, offset) -> (skill, token)
        self.tokens = {}
        self.prompts = {}
        self.tables = {}
        self.skills = {}
        self.batch = set()

    def execute(self, output):
        """A step; returns what it sampled."""
        output = pickle.loads(pickle.dumps(output))  # as to another process
        skill = getattr(output, "hotgraft_skill", None)
        for name in output.finished_req_ids:
            for book in (self.tokens, self.prompts, self.tables, self.skills):
                book.pop(name, None)
        self.batch -= output.finished_req_ids
        starts = {}
        for new in output.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.prompts[new.req_id] = len(new.prompt_token_ids)
            self.tables[new.req_id] = list(new.block_ids[0])
            self.skills[new.req_id] = named(new.sampling_params)
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                self.tables[name] = list(blocks[0])
            elif blocks is not None:
                self.tables[name] += blocks[0]
            count = cached.num_output_tokens[i]
            del self.tokens[name][self.prompts[name] + count :]  # outputs that vLLM threw away
            if self.asynchronous and name not in self.batch and count:
                # It takes these for the request's output. None may be missing or invented.
                assert cached.all_token_ids[name][-count:] == self.tokens[name][-count:], name
            starts[name] = cached.num_computed_tokens[i]
        sampled = {name: self._pass(name, skill, starts[name], n)
                   for name, n in output.num_scheduled_tokens.items()}  # fmt: skip
        assert starts.keys() == sampled.keys()
        self.batch = set(sampled)
        order = list(sampled)
        return ModelRunnerOutput(
            req_ids=order,
            req_id_to_index={name: i for i, name in enumerate(order)},
            sampled_token_ids=[sampled[name] for name in order],
        )

    def _pass(self, name, skill, start, count):
        assert self.skills[name] == skill, f"{name} in a step of {skill!r}"
        tokens, table, end = self.tokens[name], self.tables[name], start + count
        assert end <= len(tokens), "a token was to be computed that is not known"
        for at in range(start, end):
            self.cache[table[at // BLOCK], at % BLOCK] = (skill, tokens[at])
        found = [self.cache.get((table[at // BLOCK], at % BLOCK)) for at in range(end)]
        assert found == [(skill, token) for token in tokens[:end]], f"{name} reads another's cache"
        if end < len(tokens):
            return []
        tokens.append(token_after(skill, [token for _, token in found]))
        return tokens[-1:]


class Server:
    """An engine's loop around a scheduler class; with `ahead` steps planned before outputs are in.

    Time is counted in steps.
    """

    def __init__(self, scheduler, config, skills=()):
        self.asynchronous = config.scheduler_config.async_scheduling
        self.ahead = int(self.asynchronous)
        group = KVCacheGroupSpec(
            ["layer"],
            FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32),
        )
        blocks = config.cache_config.num_gpu_blocks
        self.scheduler = scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], [group]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self.now = 0.0
        self.scheduler._clock = lambda: self.now
        for skill in skills:
            self.scheduler.set_skill(skill, hashlib.sha256(skill.encode()).hexdigest())
        self.worker = Worker(asynchronous=self.asynchronous)
        self.steps = []  # for each step with tokens its skill, and how many tokens for whom
        self.sessions = set()
        self.got = {}
        self.ended = {}
        self.reasons = {}
        self._flying = deque()
        init_none_hash(_hash)
        self._hasher = get_request_block_hasher(BLOCK, _hash)

    def add(self, name, prompt, skill=None, count=8, salt=None, priority=0, digest=None, **others):
        request = Request(
            name,
            list(prompt),
            SamplingParams(
                max_tokens=count,
                temperature=0,
                ignore_eos=True,
                extra_args=None
                if skill is None
                else {"hotgraft_skill": skill, **({"hotgraft_digest": digest} if digest else {})},
            ),
            None,
            arrival_time=self.now,
            block_hasher=self._hasher,
            cache_salt=salt,
            priority=priority,
            **others,
        )
        if request.resumable:
            self.sessions.add(name)
        self.scheduler.add_request(request)
        return request

    def abort(self, *names):
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def step(self):
        """Plan a step, run it, and take in the outputs of the one that is due."""
        self.now += 1.0
        if self.scheduler.has_requests():
            evictions = self._evictions()
            output = self.scheduler.schedule()
            if self._evictions() > evictions:  # what was taken is not for newcomers
                assert not output.scheduled_new_reqs
                assert not output.scheduled_cached_reqs.resumed_req_ids
            if output.total_num_scheduled_tokens:
                skill = getattr(output, "hotgraft_skill", None)
                self.steps.append((skill, dict(output.num_scheduled_tokens)))
            self._flying.append((output, self.worker.execute(output)))
            self._check()
            if len(self._flying) <= self.ahead:
                return
        if self._flying:
            self._take(self.scheduler.update_from_output(*self._flying.popleft()))

    def run(self, steps=2000):
        """Steps until all is done; there may be no more than these."""
        for _ in range(steps):
            if not self.scheduler.has_requests() and not self._flying:
                return
            self.step()
        raise AssertionError(f"unfinished: {list(self.scheduler.requests)}")

    def _take(self, outputs):
        for output in (o for to in outputs.values() for o in to.outputs):
            self.got.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                # A session ends at each turn.
                assert output.request_id not in self.ended or output.request_id in self.sessions
                self.ended[output.request_id] = str(output.finish_reason)
                self.reasons[output.request_id] = output.stop_reason

    def _evictions(self):
        counters = getattr(self.scheduler, "counters", None)
        return counters.evictions if counters else 0

    def _check(self):
        """What must hold of a scheduler after each step."""
        it = self.scheduler
        waiting = [*it.waiting, *it.kv_holding_waiting]
        queued = [request.request_id for request in [*it.running, *waiting]]
        assert sorted(queued) == sorted(it.requests), "requests were lost, or are there twice"
        assert len(it.waiting) + len(it.kv_holding_waiting) == len(waiting)
        assert len(it.running) <= it.max_num_active_reqs
        assert all(request.status == RequestStatus.RUNNING for request in it.running)


def _hash(value):
    return hashlib.sha256(pickle.dumps(value)).digest()
