"""Admin: HTTP endpoints that list, inspect, load, pin and unload skills.

Looking is for whoever may use the server. Changing is off unless the server has a key: an admin
key, which comes in a header of its own, or else vLLM's API key.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from hotgraft.errors import (
    DeviceMemoryError,
    HotgraftError,
    LibraryFullError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.serve.vllm.leases import Skill
from hotgraft.serve.vllm.skills import Skills

KEY_HEADER = "x-hotgraft-admin-key"
"""The request header with the admin key."""
READER = ThreadPoolExecutor(1, "hotgraft-inspect")
"""For looking into files, which reads all of one: a thread of its own, so that no load waits."""


class RefusedError(HotgraftError):
    """Who asks may not change skills."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class LoadRequest(BaseModel):
    """What to load."""

    model_config = ConfigDict(extra="forbid")
    name: str
    file: str | None = None
    """In the folder of skills; without it, the name with the usual suffix."""
    cast: bool = False
    """As in `Host.load`."""


class ComposeRequest(BaseModel):
    """What to compose."""

    model_config = ConfigDict(extra="forbid")
    name: str
    skills: list[str] = Field(min_length=1)
    policy: str = "refuse"
    weights: list[float] | None = None
    """One for each skill; 1 by default."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """Who may change skills.

    Example:
        >>> from starlette.datastructures import Headers
        >>> Keys(admin="secret").require(Headers({"X-Hotgraft-Admin-Key": "secret"}))
    """

    admin: str | None = None
    api: Sequence[str] = ()
    """vLLM's."""

    def require(self, headers: Any) -> None:
        """Raise `RefusedError` unless the headers have the key; compares in constant time."""
        if self.admin:
            header, given, keys = KEY_HEADER, headers.get(KEY_HEADER, ""), [self.admin]
        elif self.api:
            header = "authorization"
            scheme, _, given = headers.get(header, "").partition(" ")
            given, keys = given if scheme.lower() == "bearer" else "", list(self.api)
        else:
            raise RefusedError(
                HTTPStatus.FORBIDDEN,
                "this server was started without --admin-key or --api-key, so skills cannot be "
                "loaded or unloaded by request",
            )
        # Digests, as strings of unequal length would tell by the time how long the key is.
        matches = [secrets.compare_digest(_digest(given), _digest(key)) for key in keys]
        if not any(matches):
            raise RefusedError(
                HTTPStatus.UNAUTHORIZED, f"the header {header} does not have the key"
            )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def router(skills: Skills, keys: Keys, report: Callable[..., None]) -> APIRouter:
    """The endpoints under `/v1/skills`.

    Args:
        skills: of the server.
        keys: who may change them.
        report: is told of refusals.
    """
    routes = APIRouter()

    @routes.get("/v1/skills")
    async def list_skills() -> Response:
        """All skills, loaded or not."""
        return JSONResponse({"object": "list", "data": [_card(skills, s) for s in skills.values()]})

    @routes.get("/v1/skills/{name:path}")
    async def inspect_skill(name: str) -> Response:
        """One skill, with what its file says."""
        try:
            skill = skills.known(name)
            described = asyncio.get_running_loop().run_in_executor(READER, _described, skill)
            return JSONResponse(_card(skills, skill) | await described)
        except (HotgraftError, OSError) as error:
            return failure(error)

    @routes.post("/v1/skills")
    async def load_skill(wanted: LoadRequest, request: Request) -> Response:
        """Load a skill on all ranks, and add it where it is not known; answers when it is done."""
        try:
            _require(keys, request, "load", wanted.name)
            path = skills.find(wanted.name, wanted.file)
            skill = await skills.load(wanted.name, path, cast=wanted.cast)
            return JSONResponse(_card(skills, skill), HTTPStatus.CREATED)
        except (HotgraftError, OSError, MemoryError) as error:
            return failure(error)

    @routes.post("/v1/compositions")
    async def compose_skills(wanted: ComposeRequest, request: Request) -> Response:
        """Make a skill of several, and load it; its file is in the folder."""
        try:
            _require(keys, request, "compose", wanted.name)
            skill = await skills.compose(
                wanted.name, wanted.skills, policy=wanted.policy, weights=wanted.weights
            )
            return JSONResponse(_card(skills, skill), HTTPStatus.CREATED)
        except (HotgraftError, OSError, MemoryError) as error:
            return failure(error)

    @routes.post("/v1/skills/{name:path}/fetch")
    async def fetch_skill(name: str, request: Request) -> Response:
        """Load a skill soon, if it is not; no request waits for that."""
        try:
            _require(keys, request, "fetch", name)
            return JSONResponse(_card(skills, skills.fetch(name)), HTTPStatus.ACCEPTED)
        except HotgraftError as error:
            return failure(error)

    @routes.post("/v1/skills/{name:path}/pin")
    async def pin_skill(name: str, request: Request) -> Response:
        """Load a skill, and keep it loaded."""
        try:
            _require(keys, request, "pin", name)
            return JSONResponse(_card(skills, await skills.pin(name)))
        except (HotgraftError, OSError, MemoryError) as error:
            return failure(error)

    @routes.post("/v1/skills/{name:path}/unpin")
    async def unpin_skill(name: str, request: Request) -> Response:
        """Let a skill go where room is wanted."""
        try:
            _require(keys, request, "unpin", name)
            return JSONResponse(_card(skills, skills.unpin(name)))
        except HotgraftError as error:
            return failure(error)

    @routes.delete("/v1/skills/{name:path}")
    async def unload_skill(name: str, request: Request, abort: bool = False) -> Response:
        """Forget a skill; with `?abort=true` also where requests of it are being answered."""
        try:
            _require(keys, request, "unload", name)
            await skills.unload(name, abort=abort)
            return JSONResponse({"id": name, "object": "skill", "deleted": True})
        except (HotgraftError, OSError) as error:
            return failure(error)

    def _require(keys: Keys, request: Request, what: str, name: str) -> None:
        try:
            keys.require(request.headers)
        except RefusedError as error:
            report("refusal", what=what, skill=name, kind="RefusedError", why=str(error))
            raise

    return routes


def _card(skills: Skills, skill: Skill) -> dict[str, Any]:
    return {
        "id": skill.name,
        "object": "skill",
        "digest": skill.digest,
        "file": str(skill.path.relative_to(skills.folder)),
        "file_bytes": skill.signature[0],
        "loaded": skill.loaded,
        "pinned": skill.pinned,
        "entries": skill.entries,
        "resident_bytes": skill.nbytes,
        "requests": skill.requests,
        "failure": str(skill.failure[1]) if skill.failure else None,
    }


def _described(skill: Skill) -> dict[str, Any]:
    """What a skill's file says; a file that has been replaced says nothing of this skill."""
    from hotgraft.inspection import inspect

    try:
        found = inspect(skill.path)
    except (HotgraftError, OSError):
        return {"metadata": None, "tensors": None}
    if found.metadata.get("id") != skill.digest:
        return {"metadata": None, "tensors": None}
    tensors = [
        {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "entries": t.entries}
        for t in found.tensors
    ]
    return {"metadata": dict(found.metadata), "tensors": tensors}


STATUS: tuple[tuple[type[BaseException], HTTPStatus], ...] = (
    (UnknownSkillError, HTTPStatus.NOT_FOUND),
    (FileNotFoundError, HTTPStatus.NOT_FOUND),
    (FileExistsError, HTTPStatus.CONFLICT),
    (SkillInUseError, HTTPStatus.CONFLICT),
    (LibraryFullError, HTTPStatus.SERVICE_UNAVAILABLE),
    (DeviceMemoryError, HTTPStatus.INSUFFICIENT_STORAGE),
    (MemoryError, HTTPStatus.INSUFFICIENT_STORAGE),
    (ValueError, HTTPStatus.UNPROCESSABLE_ENTITY),  # what is wrong with a file, of any kind
    (OSError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (HotgraftError, HTTPStatus.BAD_REQUEST),
)
"""Of errors; the first that fits."""


def failure(error: BaseException) -> Response:
    """An error as a response of the shape that vLLM's errors have."""
    if isinstance(error, RefusedError):
        status = error.status
    else:
        fitting = (status for kind, status in STATUS if isinstance(error, kind))
        status = next(fitting, HTTPStatus.INTERNAL_SERVER_ERROR)
    about = {"message": str(error), "type": type(error).__name__, "param": None, "code": status}
    headers = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    return JSONResponse({"error": about}, status, headers)
