"""Routing: a request's model is its skill.

vLLM's handlers ask `OpenAIServingModels.is_base_model` whether they serve the name that a request
gives, and pass the request on by the engine client's `generate`. Both happen in the context of one
HTTP request, and these are the two places that every kind of request passes, whatever its path is.
`SkillModels` notes the skill in the first, `route` puts it into the sampling parameters in the
second, and `Middleware` opens the context and says the skill's digest in the response.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from hotgraft.errors import UnknownSkillError
from hotgraft.serve.vllm.scheduler import ARGUMENT
from hotgraft.serve.vllm.skills import Skill, Skills

HEADER = b"x-hotgraft-digest"
"""The response header with the digest of the skill that a request was for."""


@dataclasses.dataclass
class Asked:
    """What an HTTP request asks for."""

    skill: Skill | None = None
    """None is the base."""


# A holder, and not the skill itself: handlers run in tasks that have a copy of the context.
_asked: ContextVar[Asked | None] = ContextVar("hotgraft_asked", default=None)


def _skill() -> Skill | None:
    asked = _asked.get()
    return asked.skill if asked else None


class SkillModels(OpenAIServingModels):  # type: ignore[misc]
    """vLLM's models, and the skills among them."""

    hotgraft: Mapping[str, Skill]

    @classmethod
    def adopt(cls, models: Any, skills: Mapping[str, Skill]) -> None:
        """Let vLLM's object, which its handlers hold, know the skills."""
        models.__class__ = cls
        models.hotgraft = skills

    def is_base_model(self, model_name: str) -> bool:
        """Whether requests may name it; note that this one does."""
        skill = self.hotgraft.get(model_name)
        asked = _asked.get()
        if asked is not None:
            asked.skill = skill
        return super().is_base_model(model_name) or (skill is not None and asked is not None)

    def model_name(self, lora_request: Any = None) -> str:
        """What a response says of its model."""
        skill = _skill() if lora_request is None else None
        name: str = super().model_name(lora_request) if skill is None else skill.name
        return name

    async def show_available_models(self) -> Any:
        """As vLLM's, with a card for each skill."""
        found = await super().show_available_models()
        base = self.base_model_paths[0].name
        for name in self.hotgraft:
            found.data.append(
                ModelCard(
                    id=name,
                    root=base,
                    parent=base,
                    max_model_len=self.model_config.max_model_len,
                    permission=[ModelPermission()],
                )
            )
        return found


def route(client: Any, skills: Skills) -> None:
    """Let an engine client mark each request with its skill.

    Args:
        client: vLLM's; `generate` and `encode` of this object are replaced.
        skills: of the server.
    """
    plain_generate, plain_encode = client.generate, client.encode

    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        skill = _skill()
        given = sampling_params.extra_args or {}
        if ARGUMENT in given and (skill is None or given[ARGUMENT] != skill.name):
            raise VLLMValidationError(
                f"a request names its skill as its model, and not in vllm_xargs ({ARGUMENT})",
                parameter="vllm_xargs",
            )
        if skill is None:
            return plain_generate(prompt, sampling_params, *args, **kwargs)
        sampling_params.extra_args = {**given, ARGUMENT: skill.name}
        return _outputs(skill, plain_generate(prompt, sampling_params, *args, **kwargs))

    async def _outputs(skill: Skill, outputs: Any) -> Any:
        try:
            async with contextlib.aclosing(skills.serving(skill, outputs)) as served:
                async for output in served:
                    yield output
        except UnknownSkillError as error:
            raise VLLMNotFoundError(str(error)) from error

    def encode(*args: Any, **kwargs: Any) -> Any:
        if (skill := _skill()) is not None:
            raise VLLMValidationError(
                f"{skill.name!r} is a skill, and skills are for generating; this needs the base",
                parameter="model",
            )
        return plain_encode(*args, **kwargs)

    client.generate, client.encode = generate, encode


class Middleware:
    """Opens the context of each request, and adds the header to its response.

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
            starts = message["type"] in ("http.response.start", "websocket.accept")
            if starts and asked.skill is not None:
                header = (HEADER, asked.skill.digest.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        token = _asked.set(asked)
        try:
            await self._app(scope, receive, send_named)
        finally:
            _asked.reset(token)
