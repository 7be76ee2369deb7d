"""Routing without a server: what an engine client is asked, whatever the request came by."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.v1.core.sched.scheduler")

from hotgraft.errors import FormatError, LibraryFullError, UnknownSkillError
from hotgraft.library.folder import ENDING
from hotgraft.serve.vllm import routing
from hotgraft.serve.vllm.leases import again
from hotgraft.serve.vllm.routing import Middleware, SkillModels, route
from skill_toys import Toy, digest
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError


class Client:
    """Says what it was asked."""

    async def generate(self, prompt, sampling_params, request_id):
        yield prompt, dict(sampling_params.extra_args or {}), request_id

    def encode(self, prompt):
        return prompt


class Served:
    """A client, models and an application of one endpoint."""

    def __init__(self, folder):
        self.client, self.awaited, self.toy = Client(), [], Toy(folder)
        self.toy.write(sql="ab")
        self.skills = self.toy.skills
        asyncio.run(self.skills.scan())
        route(self.client, self.skills)
        self.models = object.__new__(SkillModels)
        registry = SimpleNamespace(is_base_model=lambda name: name == "base")
        self.models.registry, self.models.hotgraft = registry, self.skills
        self.models.base_model_paths = [SimpleNamespace(name="base")]

    def ask(self, model, use, path="/v1/x"):
        """A request for a model, and what a handler does with it in a task of its own."""
        return asyncio.run(self.asking(model, use, path))

    async def asking(self, model, use, path="/v1/x", start=None, sent=None):
        sent = [] if sent is None else sent

        async def handler():
            assert self.models.is_base_model(model) == (model in ("base", "sql"))
            return await use()

        async def app(_scope, _receive, send):
            self.found = await asyncio.create_task(handler())
            await send(start or {"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"this"})

        async def before_metrics():
            self.awaited.append(path)

        async def send(message):
            sent.append(message)

        middleware = Middleware(app, before_metrics)
        await middleware({"type": "http", "path": path}, None, send)
        assert self.skills["sql"].requests == 0 if "sql" in self.skills else True
        return self.found, dict(sent[0]["headers"])

    def generate(self, model, extra=None):
        async def use():
            params = SimpleNamespace(extra_args=extra)
            found = [output async for output in self.client.generate("p", params, "r")]
            return found, self.models.model_name()

        return self.ask(model, use)


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path)


@pytest.mark.parametrize("extra", [None, {"else": 1}])
def test_requests_are_marked(extra, served):
    (((found,), name), headers) = served.generate("sql", extra)
    marks = {"hotgraft_skill": "sql", "hotgraft_digest": digest("ab")}
    assert found == ("p", {**(extra or {}), **marks}, "r")
    assert (name, headers) == ("sql", {b"x-hotgraft-digest": digest("ab").encode()})
    (((found,), name), headers) = served.generate("base", extra)
    assert found == ("p", extra or {}, "r")
    assert (name, headers) == ("base", {})


@pytest.mark.parametrize(("model", "given"), [("base", "sql"), ("base", None), ("sql", "go")])
def test_nobody_marks_requests_himself(model, given, served):
    with pytest.raises(VLLMValidationError, match="as its model"):
        served.generate(model, {"hotgraft_skill": given})
    with pytest.raises(VLLMValidationError, match="as its model"):
        served.generate(model, {"hotgraft_digest": digest("ab")})


def test_a_skill_that_leaves_between_the_check_and_the_request(served):
    async def use():
        outputs = served.client.generate("p", SimpleNamespace(extra_args=None), "r")
        await served.skills.unload("sql", abort=True)
        return await anext(outputs)

    with pytest.raises(VLLMNotFoundError, match="unloaded"):
        served.ask("sql", use)


def test_a_request_carries_the_digest_that_its_response_says(served):
    """Also where the skill is replaced before vLLM tells its engine of the request."""

    async def use():
        params = SimpleNamespace(extra_args={"else": 1})
        found = [[output async for output in served.client.generate("p", params, "r")]]
        await served.skills.unload("sql", abort=True)
        served.toy.write(sql="cd")
        await served.skills.load("sql", served.skills.find("sql"))
        assert params.extra_args == {"else": 1}
        assert served.models.is_base_model("sql")
        found.append([output async for output in served.client.generate("p", params, "r")])
        return [each[0][1]["hotgraft_digest"] for each in found]

    found, headers = served.ask("sql", use)
    assert found == [digest("ab"), digest("cd")]
    assert headers[b"x-hotgraft-digest"] == digest("cd").encode()


def test_skills_do_not_encode(served):
    async def use():
        return served.client.encode("p")

    assert served.ask("base", use)[0] == "p"
    with pytest.raises(VLLMValidationError, match="needs the base"):
        served.ask("sql", use)


def test_outside_of_a_request_there_are_no_skills(served):
    assert routing._asked.get() is None
    assert not served.models.is_base_model("sql")
    assert served.models.is_base_model("base")


def test_metrics_are_fresh(served):
    async def use():
        return None

    for path in ("/metrics", "/prefix/metrics/", "/v1/x"):
        served.ask("base", use, path)
    assert served.awaited == ["/metrics", "/prefix/metrics/"]


START = {
    "type": "http.response.start", "status": 200,
    "headers": [(b"Content-Type", b"text/event-stream; charset=utf-8")],
}  # fmt: skip


@pytest.mark.parametrize("asks", ["at once", "when it is read", "never"])
def test_a_response_begins_when_its_skill_is_loaded(served, asks):
    async def use():
        if asks == "at once":
            return served.client.generate("p", SimpleNamespace(extra_args=None), "r")
        return None

    async def run():
        served.toy.go.clear()
        sent = []
        start = None if asks == "never" else START
        asking = asyncio.ensure_future(served.asking("sql", use, start=start, sent=sent))
        await asyncio.sleep(0.02)
        assert bool(sent) == (asks == "never")
        assert served.skills["sql"].requests == (asks != "never")
        served.toy.write(sql="cd")  # what is loaded counts, and not what was known before
        served.toy.go.set()
        _, headers = await asking
        wanted = None if asks == "never" else digest("cd").encode()
        assert headers.get(b"x-hotgraft-digest") == wanted
        assert sent[-1] == {"type": "http.response.body", "body": b"this"}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status"),
    [(LibraryFullError, 503), (FormatError, 422), (UnknownSkillError, 404), (RuntimeError, 500)],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_load_that_fails_is_the_response(served, monkeypatch, error, status, streams):
    def load(*_, **__):
        raise error("it cannot be")

    monkeypatch.setattr(served.toy, "load", load)

    async def use():
        outputs = served.client.generate("p", SimpleNamespace(extra_args=None), "r")
        if not streams:
            with contextlib.suppress(VLLMNotFoundError, VLLMValidationError, RuntimeError):
                await anext(outputs)

    async def run():
        sent = []
        _, headers = await served.asking("sql", use, start=START if streams else None, sent=sent)
        assert [message["type"] for message in sent] == [START["type"], "http.response.body"]
        about = json.loads(sent[1]["body"])["error"]
        assert (about["type"], about["message"]) == (error.__name__, "it cannot be")
        assert sent[0]["status"] == about["code"] == status
        assert (headers.get(b"retry-after") == b"1") == (status == 503)

    asyncio.run(run())


def test_a_generation_in_the_background_has_its_own_hold(served):
    async def use():
        async def later():
            await asyncio.sleep(0.02)
            outputs = served.client.generate("p", SimpleNamespace(extra_args=None), "r")
            (found,) = [output async for output in outputs]
            return found

        return asyncio.ensure_future(later())

    async def run():
        task, headers = await served.asking("sql", use)
        assert b"x-hotgraft-digest" not in headers
        assert not served.toy.loaded
        assert (await task)[1] == {"hotgraft_skill": "sql", "hotgraft_digest": digest("ab")}
        assert set(served.toy.loaded) == {"sql"}
        assert served.skills["sql"].requests == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [FormatError("a"), UnknownSkillError("a"), FileNotFoundError(2, "none", "a"), OSError("a")],
)
def test_an_error_is_the_same_again(error):
    made = again(error)
    assert made is not error
    assert (type(made), str(made), made.args) == (type(error), str(error), error.args)


def test_clients_are_told_of_files_by_their_paths_in_the_folder(tmp_path, monkeypatch):
    toy = Toy(tmp_path)

    def load(_name, path, **_):
        raise FormatError(f"{path}: it is odd")

    async def run():
        toy.write(a="a", b="b")
        await toy.skills.scan()
        monkeypatch.setattr(toy, "load", load)
        for _ in range(2):
            with pytest.raises(FormatError) as told:
                await toy.use("a")
            assert str(told.value) == f"a{ENDING}: it is odd"
        toy.skills.find("b").unlink()
        with pytest.raises(FileNotFoundError, match=f": 'b{ENDING}'"):
            await toy.use("b")
        (tmp_path / f"text{ENDING}").write_text("no skill, and it is long enough")
        with pytest.raises(FormatError) as told:
            await toy.skills.load("text", toy.skills.find("text"))
        assert str(told.value).startswith(f"text{ENDING}")

    asyncio.run(run())
    where = [str(tmp_path) in line["why"] for line in toy.events("refusal")]
    assert where == [True] * 3  # the operator knows the folder
