"""`hotgraft serve` with a real vLLM behind it, by HTTP on loopback."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import hotgraft
import served
import typer
from checkpoints import tuned
from hotgraft.errors import HotgraftError
from hotgraft.serve.vllm.server import EngineArgs
from hotgraft.serve.vllm.worker import connect
from hotgraft.serve_command import CONTEXT, serve
from safetensors.torch import load_file
from typer.testing import CliRunner
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname

SEEDS = {"sql": 1, "french": 2, "legal": 11}
BAD = {"corrupt", "stranger"}
PROMPTS = [f"w{i} w{i + 40} w{7 * i}" for i in range(2, 10)]
COUNT = 16
BOTH = {"skills": ["sql", "french"], "policy": "sum", "weights": [1.0, 0.5]}


class Setting:
    """A checkpoint, a folder of skills with three good and two bad ones, and what is right."""

    def __init__(self, folder):
        self.folder = folder
        self.base = served.checkpoint(folder)
        self.skills = folder / "skills"
        self.later = self.skills / "later"  # what the server does not load by itself
        self.later.mkdir(parents=True)
        self.digests = {
            name: served.graft(self.base, self.file(name), seed) for name, seed in SEEDS.items()
        }
        self.file("corrupt").write_bytes(self.file("sql").read_bytes()[:-100])
        state = load_file(self.base / served.WEIGHTS)
        other = {name: tensor + 1 for name, tensor in state.items()}
        hotgraft.diff(other, tuned(other)).save(self.file("stranger"))

    def file(self, name):
        return self.skills / f"{name}.graft.safetensors"

    def wanted(self):
        """What an engine with one skill at a time gives, without our scheduler and server."""
        llm = LLM(
            str(self.base),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            block_size=32,
            seed=0,
            worker_extension_cls="hotgraft.serve.vllm.worker.Grafts",
        )
        ranks = connect(llm)
        found = {}
        sampling = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True)
        for name in ("toy", *SEEDS):
            if name != "toy":
                ranks.load(name, self.file(name))
                ranks.activate(name)
            llm.reset_prefix_cache()
            for prompt in PROMPTS:
                (output,) = llm.generate(prompt, sampling, use_tqdm=False)
                found[name, prompt] = output.outputs[0].text
            ranks.deactivate()
        ranks.activate(*BOTH["skills"], policy=BOTH["policy"], weights=BOTH["weights"])
        llm.reset_prefix_cache()
        (output,) = llm.generate(PROMPTS[0], sampling, use_tqdm=False)
        found["both", PROMPTS[0]] = output.outputs[0].text
        llm.llm_engine.engine_core.shutdown()
        return found


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def wanted(setting):
    return setting.wanted()


@pytest.fixture(scope="module")
def server(setting, wanted):  # noqa: ARG001 - one engine at a time, as far as can be
    room = str(int(2.5 * setting.file("sql").stat().st_size))  # for two of them
    options = ("--watch", "--admin-key", served.ADMIN_KEY, "--quantum", "2", "--resident", room)
    with served.Server(setting.folder, setting.base, setting.skills, *options) as running:
        yield running


def eventually(found, seconds=30):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.1)


def listed(server):
    return {card["id"]: card for card in server.get("/v1/skills")[1]["data"]}


def error_of(answer):
    status, found, _ = answer
    return status, found["error"]["type"], found["error"]["message"]


# ---- requests -----------------------------------------------------------------------------------


def test_models_are_the_base_and_all_skills_of_which_none_is_loaded(server):
    status, found, _ = server.get("/v1/models")
    assert status == 200
    parents = {card["id"]: card["parent"] for card in found["data"]}
    assert parents == {"toy": None} | dict.fromkeys([*SEEDS, *BAD], "toy")
    assert server.events("scan")[0]["known"] == len(parents) - 1
    assert not any(card["loaded"] for card in listed(server).values())


@pytest.mark.parametrize(
    ("name", "kind"), [("corrupt", "FormatError"), ("stranger", "BaseMismatchError")]
)
def test_a_bad_file_is_told_to_who_asks_and_logged_once(server, name, kind):
    body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 2}
    for more in ({}, {"stream": True}):
        answer = server.request("POST", "/v1/completions", {**body, **more})
        assert error_of(answer)[:2] == (422, kind)
        assert "x-hotgraft-digest" not in answer[2]
    lines = [line["kind"] for line in server.events("refusal") if line["skill"] == name]
    assert lines == [kind]
    assert listed(server)[name]["failure"]


def test_a_model_is_a_skill_and_answers_are_those_of_a_one_skill_engine(server, wanted):
    assert len({wanted[name, PROMPTS[0]] for name in ("toy", *SEEDS)}) == 1 + len(SEEDS)
    for prompt in PROMPTS[:3]:
        for name in ("sql", "toy", "french", "sql"):
            assert server.complete(name, prompt, COUNT) == wanted[name, prompt]


@pytest.mark.parametrize("name", ["toy", *SEEDS])
def test_responses_say_the_skill_and_its_digest(server, setting, name):
    body = {"model": name, "max_tokens": 4, "temperature": 0}
    chat = {**body, "messages": [{"role": "user", "content": "w5 w6"}]}
    plain = {**body, "prompt": "w5 w6 "}
    texts = set()
    for path, request in (("/v1/chat/completions", chat), ("/v1/completions", plain)):
        for more in ({}, {"stream": True}):
            connection, response = server.open("POST", path, {**request, **more})
            with contextlib.closing(connection):
                assert response.status == 200
                assert response.getheader("x-hotgraft-digest") == setting.digests.get(name)
                if more:
                    texts.add(served.streamed(response).strip())
        status, found, _ = server.request("POST", path, request)
        assert (status, found["model"]) == (200, name)
        choice = found["choices"][0]
        texts.add((choice["text"] if "text" in choice else choice["message"]["content"]).strip())
    assert len(texts) == 1


def test_an_unknown_model_is_a_404(server):
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = {"model": "poetry", "prompt": "w1", "messages": [{"role": "user", "content": "w1"}]}
        status, kind, message = error_of(server.request("POST", path, body))
        assert (status, kind) == (404, "NotFoundError")
        assert "poetry" in message


@pytest.mark.parametrize(
    ("model", "given", "status"),
    [("toy", "sql", 400), ("french", "sql", 400), ("toy", "", 400), ("sql", "sql", 200)],
)
def test_only_the_model_names_the_skill(server, model, given, status):
    body = {"model": model, "prompt": "w5", "max_tokens": 2}
    answer = server.request(
        "POST", "/v1/completions", {**body, "vllm_xargs": {"hotgraft_skill": given}}
    )
    assert answer[0] == status
    if status == 400:
        assert "as its model" in error_of(answer)[2]


def test_other_arguments_pass(server, wanted):
    text = server.complete("sql", PROMPTS[0], COUNT, vllm_xargs={"else": 1}, n=1)
    assert text == wanted["sql", PROMPTS[0]]


def test_beams_are_searched_with_the_skill(server):
    body = {"prompt": "w5 w6", "max_tokens": 4, "temperature": 0, "use_beam_search": True}
    answers = [
        server.request("POST", "/v1/completions", {"model": name, **body, "n": 2})
        for name in ("toy", *SEEDS)
    ]
    assert {status for status, _, _ in answers} == {200}
    assert len({found["choices"][0]["text"] for _, found, _ in answers}) == len(answers)


def test_mixed_traffic_streamed_or_not(server, wanted):
    requests = [(name, prompt) for prompt in PROMPTS for name in ("toy", *SEEDS)]

    def ask(i):
        name, prompt = requests[i]
        if i % 2:
            return server.complete(name, prompt, COUNT)
        return served.streamed(server.stream(name, prompt, COUNT))

    before = server.metrics()
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(len(requests))))
    assert texts == [wanted[request] for request in requests]
    time.sleep(0.6)
    found = server.metrics()
    for what in ("switches", "skill_evictions", "skill_misses", "skill_hits"):
        assert found[f"hotgraft_{what}_total"] > before[f"hotgraft_{what}_total"]
    assert all(line["resident"] <= found["hotgraft_resident_limit_bytes"]
               for line in server.events("load"))  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "w5 w6", "max_output_tokens": 8}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 8}),
    ],
)
def test_other_kinds_of_requests(server, setting, path, body):
    texts = set()
    for name in ("toy", *SEEDS):
        status, found, headers = server.request(
            "POST", path, {"model": name, "temperature": 0, **body}
        )
        assert status == 200, found
        assert headers.get("x-hotgraft-digest") == setting.digests.get(name)
        (said,) = found.get("output", [found])
        texts.add(said["content"][0]["text"])
    assert len(texts) == 1 + len(SEEDS)


def test_a_client_that_goes_away_disturbs_nobody(server, wanted):
    whole = server.complete("french", PROMPTS[0], 100)
    before = generated(server)
    streams = [server.stream("french", prompt, 100) for prompt in PROMPTS[:4]]
    first = served.streamed([streams[0].readline()])
    for stream in streams[1:]:
        stream.readline()
        stream.connection.close()
        stream.close()
    assert server.complete("sql", PROMPTS[0], COUNT) == wanted["sql", PROMPTS[0]]
    assert served.streamed(streams[0], first) == whole
    eventually(lambda: listed(server)["french"]["requests"] == 0)
    assert 100 + COUNT <= generated(server) - before < 4 * 100 + COUNT  # they were not finished


def generated(server):
    """How many tokens vLLM has made."""
    lines = server.get("/metrics")[1].splitlines()
    return sum(
        float(line.rsplit(" ")[1])
        for line in lines
        if line.startswith("vllm:generation_tokens_total")
    )


# ---- skills that come and go --------------------------------------------------------------------


def test_who_has_no_key_may_look_and_nothing_else(server):
    body = {"name": "third", "file": "later/third.graft.safetensors"}
    for headers in ({}, {"X-Hotgraft-Admin-Key": "no"}, {"Authorization": served.ADMIN_KEY}):
        for request in (
            ("POST", "/v1/skills", body),
            ("DELETE", "/v1/skills/sql", None),
            *(("POST", f"/v1/skills/sql/{what}", None) for what in ("fetch", "pin", "unpin")),
        ):
            status, kind, message = error_of(server.request(*request, headers))
            assert (status, kind) == (401, "RefusedError")
            assert served.ADMIN_KEY not in message
    assert listed(server).keys() == SEEDS.keys() | BAD
    assert "RefusedError" in {line["kind"] for line in server.events("refusal")}


def test_a_skill_is_inspected(server, setting):
    status, found, _ = server.get("/v1/skills/sql")
    assert status == 200
    assert found["digest"] == found["metadata"]["id"] == setting.digests["sql"]
    entries = sum(tensor["entries"] for tensor in found["tensors"])
    assert found["entries"] in (entries, None)
    assert server.get("/v1/skills/poetry")[0] == 404


def test_fetching_and_pinning(server, wanted):
    for name in ("sql", "french"):
        status, card, _ = server.admin("POST", f"/v1/skills/{name}/pin")
        assert (status, card["loaded"], card["pinned"]) == (200, True, True)
    body = {"model": "legal", "prompt": PROMPTS[0], "max_tokens": 2}
    for more in ({}, {"stream": True}):
        answer = server.request("POST", "/v1/completions", {**body, **more})
        assert error_of(answer)[:2] == (503, "LibraryFullError")
        assert answer[2]["retry-after"] == "1"
    assert server.complete("sql", PROMPTS[0], COUNT) == wanted["sql", PROMPTS[0]]
    assert server.admin("POST", "/v1/skills/sql/unpin")[1]["pinned"] is False
    assert server.admin("POST", "/v1/skills/legal/fetch")[0] == 202
    eventually(lambda: listed(server)["legal"]["loaded"])
    cards = listed(server)
    assert {name for name in cards if cards[name]["loaded"]} == {"french", "legal"}
    assert server.complete("legal", PROMPTS[0], COUNT) == wanted["legal", PROMPTS[0]]
    assert server.admin("POST", "/v1/skills/french/unpin")[0] == 200
    for what in ("fetch", "pin", "unpin"):
        assert error_of(server.admin("POST", f"/v1/skills/poetry/{what}"))[0] == 404


def load(server, name, file=None):
    return server.admin("POST", "/v1/skills", {"name": name, "file": file and f"later/{file}"})


def test_load_use_unload_and_load_another_of_that_name(server, setting):
    texts = []
    for seed in (3, 4):
        path = setting.later / f"third-{seed}.graft.safetensors"
        digest = served.graft(setting.base, path, seed)
        status, card, _ = load(server, "third", path.name)
        assert (status, card["digest"], card["requests"]) == (201, digest, 0)
        texts.append(server.complete("third", PROMPTS[0], COUNT))
        assert server.admin("DELETE", "/v1/skills/third")[0] == 200
        assert error_of(server.admin("DELETE", "/v1/skills/third"))[0] == 404
        body = {"model": "third", "prompt": "w5"}
        assert server.request("POST", "/v1/completions", body)[0] == 404
    assert len({*texts, server.complete("toy", PROMPTS[0], COUNT)}) == 3


def test_skills_are_composed_by_request(server, setting, wanted):
    body = {"name": "both", **BOTH}
    assert server.request("POST", "/v1/compositions", body)[0] == 401
    status, card, _ = server.admin("POST", "/v1/compositions", body)
    assert status == 201, card
    grafts = [hotgraft.Graft.load(setting.file(name)) for name in BOTH["skills"]]
    assert card["digest"] == hotgraft.compose(grafts, BOTH["policy"], BOTH["weights"]).id
    assert server.complete("both", PROMPTS[0], COUNT) == wanted["both", PROMPTS[0]]
    assert len({wanted[name, PROMPTS[0]] for name in ("both", "sql", "french")}) == 3
    for wrong, status in (
        ({}, 409),
        ({"name": "more", "policy": "average"}, 422),
        ({"name": "more", "skills": ["sql", "poems"]}, 404),
        ({"name": "more", "skills": []}, 400),
    ):
        assert server.admin("POST", "/v1/compositions", body | wrong)[0] == status
    assert server.admin("DELETE", "/v1/skills/both")[0] == 200
    setting.file("both").unlink()


def test_what_cannot_be_loaded(server, setting, wanted):
    (setting.folder / "outside.graft.safetensors").write_bytes(setting.file("sql").read_bytes())
    stranger = setting.later / "stranger.graft.safetensors"
    stranger.write_bytes(setting.file("stranger").read_bytes())
    for name, file, status, kind in [
        ("bad", "../corrupt.graft.safetensors", 422, "FormatError"),
        ("strange", "stranger.graft.safetensors", 422, "BaseMismatchError"),
        ("sql", "stranger.graft.safetensors", 409, "SkillInUseError"),
        ("toy", "stranger.graft.safetensors", 400, "HotgraftError"),
        ("x", "nowhere.graft.safetensors", 404, "FileNotFoundError"),
        ("x", "../../outside.graft.safetensors", 400, "HotgraftError"),
    ]:
        assert error_of(load(server, name, file))[:2] == (status, kind)
    assert load(server, "x", None)[0] == 404
    assert server.admin("POST", "/v1/skills", {"nam": "x"})[0] == 400
    assert listed(server).keys() == SEEDS.keys() | BAD
    assert server.complete("sql", PROMPTS[1], COUNT) == wanted["sql", PROMPTS[1]]


def test_of_two_loads_of_one_name_one_wins(server, setting):
    served.graft(setting.base, setting.later / "twin.graft.safetensors", 5)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: load(server, "twin", "twin.graft.safetensors"), range(4)))
    assert sorted(status for status, _, _ in answers) == [201, 409, 409, 409]
    assert server.admin("DELETE", "/v1/skills/twin")[0] == 200


def test_a_skill_in_use_stays_unless_its_requests_are_aborted(server, setting, wanted):
    served.graft(setting.base, setting.later / "busy.graft.safetensors", 6)
    assert load(server, "busy", "busy.graft.safetensors")[0] == 201
    stop = threading.Event()

    def others():
        while not stop.is_set():
            for name in SEEDS:
                assert server.complete(name, PROMPTS[0], COUNT) == wanted[name, PROMPTS[0]]

    with ThreadPoolExecutor(1) as pool:
        traffic = pool.submit(others)
        try:
            stream = server.stream("busy", PROMPTS[0], 120)
            stream.readline()
            status, kind, message = error_of(server.admin("DELETE", "/v1/skills/busy"))
            assert (status, kind) == (409, "SkillInUseError")
            assert "1 requests" in message
            assert server.admin("DELETE", "/v1/skills/busy?abort=true")[0] == 200
            assert b"error" in stream.read()
        finally:
            stop.set()
        traffic.result(60)
    assert server.events("unload")[-1]["aborted"] == 1
    assert server.request("POST", "/v1/completions", {"model": "busy", "prompt": "w1"})[0] == 404


def test_a_watched_folder(server, setting):
    path = setting.file("watched")
    body = {"model": "watched", "prompt": PROMPTS[0], "max_tokens": COUNT, "temperature": 0}
    texts = set()
    for seed in (7, 8):
        digest = served.graft(setting.base, path, seed)
        eventually(lambda wanted=digest: listed(server).get("watched", {}).get("digest") == wanted)
        for others in (False, True):  # with others it has to go in between
            for name in SEEDS if others else ():
                server.complete(name, PROMPTS[1], 2)
            status, found, headers = server.request("POST", "/v1/completions", body)
            assert (status, headers["x-hotgraft-digest"]) == (200, digest)
            texts.add((digest, found["choices"][0]["text"]))
    assert len(texts) == len({text for _, text in texts}) == 2  # each has one, and its own
    path.unlink()
    eventually(lambda: "watched" not in listed(server))


# ---- what is seen from outside ------------------------------------------------------------------


def test_metrics(server):
    time.sleep(0.6)
    found = server.metrics()
    cards = listed(server).values()
    assert found["hotgraft_known_skills"] == len(cards)
    assert found["hotgraft_loaded_skills"] == sum(card["loaded"] for card in cards)
    assert found["hotgraft_resident_bytes"] == sum(card["resident_bytes"] for card in cards)
    assert 0 < found["hotgraft_resident_bytes"] <= found["hotgraft_resident_limit_bytes"]
    assert found["hotgraft_load_wait_seconds_count"] == found["hotgraft_skill_misses_total"]
    assert len(server.events("evict")) == found["hotgraft_skill_evictions_total"] > 0
    assert found["hotgraft_loads_total"] >= 2
    assert found['hotgraft_refusals_total{kind="FormatError"}'] >= 1
    assert found["hotgraft_switches_total"] > 0
    assert found["hotgraft_switch_seconds_count"] >= found["hotgraft_switches_total"]
    assert found["hotgraft_switch_seconds_sum"] > 0
    assert found["hotgraft_wait_seconds_count"] > 0
    assert found['hotgraft_steps_total{of="skills"}'] > 0
    assert "vllm:" in server.get("/metrics")[1]


def test_the_server_listens_on_loopback(server):
    assert server.events("listen")[0]["address"] == f"http://127.0.0.1:{server.port}"


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--port", "1", "MODEL", "--skills", "."], 2, "comes first"),
        (["MODEL"], 2, "--skills"),
        (["MODEL", "--skills", "nowhere"], 2, "nowhere"),
        (["MODEL", "--skills", ".", "--worker-cls", "a.B"], 1, "--worker-cls"),
        (["MODEL", "--skills", ".", "--data-parallel-size", "2"], 1, "--data-parallel-size"),
        (["MODEL", "--skills", ".", "--quantum", "0"], 1, "quantum is 0"),
        (["MODEL", "--skills", ".", "--resident", "lots"], 2, "no size"),
    ],
)
def test_bad_use(arguments, status, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(context_settings=CONTEXT)(serve)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status
    assert message in result.output


@pytest.mark.parametrize(
    ("asynchronous", "name"), [(True, "AsyncSkillScheduler"), (False, "SkillScheduler")]
)
def test_the_scheduler_fits_the_kind_of_scheduling(monkeypatch, asynchronous, name):
    scheduling = SimpleNamespace(async_scheduling=asynchronous, scheduler_cls=None)
    config = SimpleNamespace(scheduler_config=scheduling)
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda _: config)
    arguments = object.__new__(EngineArgs)
    assert arguments.create_engine_config() is config
    assert resolve_obj_by_qualname(scheduling.scheduler_cls).__name__ == name
    with pytest.raises(HotgraftError, match="skills need their own"):
        arguments.create_engine_config()
