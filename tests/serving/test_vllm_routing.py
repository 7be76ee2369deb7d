"""Routing without a server: what an engine client is asked, whatever the request came by."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.v1.core.sched.scheduler")

from hotgraft.serve.vllm import routing
from hotgraft.serve.vllm.routing import Middleware, SkillModels, route
from hotgraft.serve.vllm.skills import Skill, Skills
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

SQL = Skill("sql", "ab12", Path("sql.graft.safetensors"), 1, 8)


class Client:
    """Says what it was asked."""

    async def generate(self, prompt, sampling_params, request_id):
        yield prompt, dict(sampling_params.extra_args or {}), request_id

    def encode(self, prompt):
        return prompt


class Served:
    """A client, models and an application of one endpoint."""

    def __init__(self):
        self.client, self.awaited = Client(), []
        self.skills = Skills(None, None, Path(), None, None)
        self.skills._table["sql"] = SQL
        route(self.client, self.skills)
        self.models = object.__new__(SkillModels)
        registry = SimpleNamespace(is_base_model=lambda name: name == "base")
        self.models.registry, self.models.hotgraft = registry, self.skills
        self.models.base_model_paths = [SimpleNamespace(name="base")]

    def ask(self, model, use, path="/v1/x"):
        """A request for a model, and what a handler does with it in a task of its own."""
        sent = []

        async def handler():
            assert self.models.is_base_model(model) == (model in ("base", "sql"))
            return await use()

        async def app(_scope, _receive, send):
            self.found = await asyncio.create_task(handler())
            await send({"type": "http.response.start", "headers": []})

        async def before_metrics():
            self.awaited.append(path)

        async def send(message):
            sent.append(message)

        middleware = Middleware(app, before_metrics)
        asyncio.run(middleware({"type": "http", "path": path}, None, send))
        return self.found, dict(sent[0]["headers"])

    def generate(self, model, extra=None):
        async def use():
            params = SimpleNamespace(extra_args=extra)
            found = [output async for output in self.client.generate("p", params, "r")]
            return found, self.models.model_name()

        return self.ask(model, use)


@pytest.mark.parametrize("extra", [None, {"else": 1}])
def test_requests_are_marked(extra):
    (((found,), name), headers) = Served().generate("sql", extra)
    assert found == ("p", {**(extra or {}), "hotgraft_skill": "sql"}, "r")
    assert (name, headers) == ("sql", {b"x-hotgraft-digest": b"ab12"})
    (((found,), name), headers) = Served().generate("base", extra)
    assert found == ("p", extra or {}, "r")
    assert (name, headers) == ("base", {})


@pytest.mark.parametrize(("model", "given"), [("base", "sql"), ("base", None), ("sql", "go")])
def test_nobody_marks_requests_himself(model, given):
    with pytest.raises(VLLMValidationError, match="as its model"):
        Served().generate(model, {"hotgraft_skill": given})


def test_a_skill_that_leaves_between_the_check_and_the_request():
    served = Served()

    async def use():
        outputs = served.client.generate("p", SimpleNamespace(extra_args=None), "r")
        del served.skills._table["sql"]
        return await anext(outputs)

    with pytest.raises(VLLMNotFoundError, match="just been unloaded"):
        served.ask("sql", use)


def test_skills_do_not_encode():
    served = Served()

    async def use():
        return served.client.encode("p")

    assert served.ask("base", use)[0] == "p"
    with pytest.raises(VLLMValidationError, match="needs the base"):
        served.ask("sql", use)


def test_outside_of_a_request_there_are_no_skills():
    served = Served()
    assert routing._asked.get() is None
    assert not served.models.is_base_model("sql")
    assert served.models.is_base_model("base")


def test_metrics_are_fresh():
    served = Served()

    async def use():
        return None

    for path in ("/metrics", "/prefix/metrics/", "/v1/x"):
        served.ask("base", use, path)
    assert served.awaited == ["/metrics", "/prefix/metrics/"]
