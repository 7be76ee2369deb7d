"""Routing: a request's model is its skill.

vLLM's handlers ask `OpenAIServingModels.is_base_model` whether they serve the name that a request
gives, and pass the request on by the engine client's `generate`. Both happen in the context of one
HTTP request, and these are the two places that every kind of request passes, whatever its path is.
`SkillModels` notes the skill in the first, `route` puts it into the sampling parameters in the
second, and `Middleware` opens the context and says the skill's digest in the response.

A skill that is not loaded begins to be when the engine is asked, which is after a request was found
to be valid, and the response begins when it is: so a load that fails is an error of its own status,
also for who wants a stream, and the digest is that of the weights that answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from hotgraft.errors import HotgraftError, UnknownSkillError
from hotgraft.serve.vllm.admin import failure
from hotgraft.serve.vllm.leases import Lease, Skill
from hotgraft.serve.vllm.scheduler import ARGUMENT, DIGEST
from hotgraft.serve.vllm.skills import Skills

HEADER = b"x-hotgraft-digest"
"""The response header with the digest of the skill that a request was for."""


class Asked:
    """What an HTTP request asks for. It has one lease, however often it asks the engine."""

    def __init__(self) -> None:
        self.lease: Lease | None = None
        """On the skill that it names; None is the base."""
        self.held: Lease | None = None
        """The same once it was entered."""
        self.refused = False
        """It could not be loaded, and the response says so already."""
        self._ended = False

    def hold(self) -> None:
        """Its skill is to be loaded, and to stay so until the response has ended.

        After that (a response that is made in the background) each generation has its own hold.
        """
        if self.lease is not self.held and self.lease is not None and not self._ended:
            self.release()
            self.held = self.lease.__enter__()

    def release(self) -> None:
        """It needs its skill no longer."""
        if self.held is not None:
            self.held.__exit__()
            self.held = None

    def end(self) -> None:
        """The response has ended."""
        self._ended = True
        self.release()


# A holder, and not the skill itself: handlers run in tasks that have a copy of the context.
_asked: ContextVar[Asked | None] = ContextVar("hotgraft_asked", default=None)


def _skill() -> Skill | None:
    asked = _asked.get()
    return asked.lease.skill if asked and asked.lease else None


class SkillModels(OpenAIServingModels):  # type: ignore[misc]
    """vLLM's models, and the skills among them."""

    hotgraft: Skills

    @classmethod
    def adopt(cls, models: Any, skills: Skills) -> None:
        """Let vLLM's object, which its handlers hold, know the skills."""
        models.__class__ = cls
        models.hotgraft = skills

    def is_base_model(self, model_name: str) -> bool:
        """Whether requests may name it; note that this one does."""
        skill = self.hotgraft.get(model_name)
        asked = _asked.get()
        if asked is not None and (
            skill is None or asked.lease is None or asked.lease.skill is not skill
        ):
            asked.lease = None if skill is None else self.hotgraft.lease(skill)
        return super().is_base_model(model_name) or (skill is not None and asked is not None)

    def model_name(self, lora_request: Any = None) -> str:
        """What a response says of its model."""
        skill = _skill() if lora_request is None else None
        name: str = super().model_name(lora_request) if skill is None else skill.name
        return name

    async def show_available_models(self) -> Any:
        """As vLLM's, with a card for each skill."""
        found = await super().show_available_models()
        # Of thousands: others are answered meanwhile.
        found.data += await asyncio.to_thread(self._cards, list(self.hotgraft))
        return found

    def _cards(self, names: list[str]) -> list[ModelCard]:
        base, longest = self.base_model_paths[0].name, self.model_config.max_model_len
        return [
            ModelCard(
                id=name,
                root=base,
                parent=base,
                max_model_len=longest,
                permission=[ModelPermission()],
            )
            for name in names
        ]


def route(client: Any, skills: Skills) -> None:
    """Let an engine client mark each request with its skill.

    Args:
        client: vLLM's; `generate` and `encode` of this object are replaced.
        skills: of the server.
    """
    plain_generate, plain_encode = client.generate, client.encode

    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        asked, skill = _asked.get(), _skill()
        given = sampling_params.extra_args or {}
        named = ARGUMENT in given and (skill is None or given[ARGUMENT] != skill.name)
        if named or DIGEST in given:
            raise VLLMValidationError(
                f"a request names its skill as its model, and sets neither {ARGUMENT} nor {DIGEST} "
                "in vllm_xargs",
                parameter="vllm_xargs",
            )
        if skill is None:
            return plain_generate(prompt, sampling_params, *args, **kwargs)
        assert asked is not None
        assert asked.lease is not None
        asked.hold()
        params = copy.copy(sampling_params)  # a handler may use its own again
        outputs = plain_generate(prompt, params, *args, **kwargs)
        return _outputs(asked, asked.lease, params, outputs)

    async def _outputs(asked: Asked, lease: Lease, params: Any, outputs: Any) -> Any:
        if asked.refused:
            return
        try:
            with lease:
                skill = await lease.ready()
                # vLLM reads these when it is asked for the first output. With the digest: until the
                # request is in the scheduler, its skill may be unloaded, and another one come.
                marks = {ARGUMENT: skill.name, DIGEST: skill.digest}
                params.extra_args = {**(params.extra_args or {}), **marks}
                async with contextlib.aclosing(skills.serving(lease, outputs)) as served:
                    async for output in served:
                        yield output
        except UnknownSkillError as error:
            raise VLLMNotFoundError(str(error)) from error
        except (HotgraftError, OSError, MemoryError) as error:
            # Of a load that failed. `Middleware` has a better answer, if there is still to be one.
            raise VLLMValidationError(str(error), parameter="model") from error

    def encode(*args: Any, **kwargs: Any) -> Any:
        if (skill := _skill()) is not None:
            raise VLLMValidationError(
                f"{skill.name!r} is a skill, and skills are for generating; this needs the base",
                parameter="model",
            )
        return plain_encode(*args, **kwargs)

    client.generate, client.encode = generate, encode


class Middleware:
    """Opens the context of each request, and begins its response when its skill is loaded.

    Args:
        app: what comes next (ASGI).
        before_metrics: is awaited before metrics are answered.
    """

    def __init__(self, app: Any, before_metrics: Callable[[], Awaitable[None]]) -> None:
        self._app = app
        self._before_metrics = before_metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if scope["path"].rstrip("/").endswith("/metrics"):
            await self._before_metrics()
        asked = Asked()

        async def send_named(message: Any) -> None:
            if asked.refused:
                return
            if message["type"] == "http.response.start":
                if _is_stream(message):  # some ask the engine only when they are read
                    asked.hold()
                if asked.held is not None:
                    try:
                        skill = await asked.held.ready()
                    except Exception as error:
                        asked.refused = True  # what was to be sent is of no use
                        await failure(error)(scope, receive, send)
                        return
                    header = (HEADER, skill.digest.encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        token = _asked.set(asked)
        try:
            await self._app(scope, receive, send_named)
        finally:
            _asked.reset(token)
            asked.end()


def _is_stream(start: Any) -> bool:
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    return start["status"] == HTTPStatus.OK and b"event-stream" in headers.get(b"content-type", b"")
