"""Server: vLLM's OpenAI server, with skills. What `hotgraft serve` runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from argparse import Namespace
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import REGISTRY
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import (
    build_async_engine_client_from_engine_args,
)
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hotgraft.errors import HotgraftError
from hotgraft.serve.ranks import error_of
from hotgraft.serve.vllm.admin import Keys, router
from hotgraft.serve.vllm.metrics import Events, Metrics
from hotgraft.serve.vllm.routing import Middleware, SkillModels, route
from hotgraft.serve.vllm.skills import Skills
from hotgraft.serve.vllm.turns import Rules
from hotgraft.serve.vllm.worker import connect

WORKER = "hotgraft.serve.vllm.served.ServedWorker"
SCHEDULERS = "hotgraft.serve.vllm.core"
POLL = 0.01
"""Seconds between two questions whether a skill is loaded: workers answer them between steps."""
LOOK = 1.0
"""Seconds between two looks at whether an engine that does not answer is dead."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `hotgraft serve` knows besides vLLM's options."""

    skills: Path
    """The folder with the graft files."""
    resident: int
    """Bytes that loaded skills may take on all ranks together."""
    watch: bool = False
    """Whether to keep up with the folder."""
    admin_key: str | None = None
    rules: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of `hotgraft.serve.vllm.turns.Rules`: those that were given."""


class EngineArgs(AsyncEngineArgs):  # type: ignore[misc]
    """vLLM's, with a scheduler that fits."""

    def create_engine_config(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; it knows only in the end whether scheduling is asynchronous."""
        config = super().create_engine_config(*args, **kwargs)
        scheduling = config.scheduler_config
        if scheduling.scheduler_cls is not None:
            raise HotgraftError(
                f"vLLM wants the scheduler {scheduling.scheduler_cls} for this model or these "
                "options, and skills need their own"
            )
        name = "AsyncSkillScheduler" if scheduling.async_scheduling else "SkillScheduler"
        scheduling.scheduler_cls = f"{SCHEDULERS}.{name}"
        return config


def parse(model: str, options: Sequence[str], settings: Settings) -> Namespace:
    """vLLM's options, with what skills need. Ends the process where vLLM's parser does.

    Args:
        model: a folder or a name.
        options: of vLLM's server, as on its command line.
        settings: of this command.

    Raises:
        HotgraftError: options that do not go together with skills, or rules out of range.
    """
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="hotgraft serve MODEL --skills DIR"))
    args: Namespace = parser.parse_args(["--model", model, *options])
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    _refuse(args)
    args.host = args.host or "127.0.0.1"
    args.worker_cls = WORKER
    extra = dict(args.additional_config or {})
    rules = {**extra.get("hotgraft", {}), **settings.rules}
    Rules.read(rules)  # refused now, and not in the engine a minute later
    args.additional_config = {**extra, "hotgraft": rules}
    return args


def _refuse(args: Namespace) -> None:
    """Options under which a request could be answered with the wrong weights, or by nobody."""
    wrong = {
        "--worker-cls": args.worker_cls != "auto",
        "--scheduler-cls": args.scheduler_cls is not None,
        "--data-parallel-size": args.data_parallel_size > 1,
        "--api-server-count": (args.api_server_count or 1) > 1,
        "--headless": args.headless,
        "--grpc": args.grpc,
        "VLLM_SKIP_MODEL_NAME_VALIDATION": envs.VLLM_SKIP_MODEL_NAME_VALIDATION,
        "VLLM_SERVER_DEV_MODE": envs.VLLM_SERVER_DEV_MODE,  # anybody could call the workers
    }
    if found := [name for name, there in wrong.items() if there]:
        raise HotgraftError(f"hotgraft serve does not go together with {', '.join(found)}")


def serve(args: Namespace, settings: Settings) -> None:
    """Serve until the process is told to end.

    Args:
        args: from `parse`.
        settings: of this command.
    """
    # As vLLM does: until it answers, a signal must not leave its processes behind.
    signal.signal(signal.SIGTERM, _interrupt)
    uvloop.run(_serve(args, settings))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("terminated")


async def _serve(args: Namespace, settings: Settings) -> None:
    listen_address, sock = setup_server(args, reuse_port=False)
    engine_args = EngineArgs.from_cli_args(args)
    with contextlib.closing(sock):
        async with build_async_engine_client_from_engine_args(engine_args) as client:
            app = await _build(client, args, settings)
            Events()("listen", address=listen_address)
            ended = await _answer(app, sock, args)
        await ended


async def _build(client: Any, args: Namespace, settings: Settings) -> Any:
    """vLLM's application with skills in it; those of the folder are known."""
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    models, events, engine = app.state.openai_serving_models, Events(), Engine(client)

    def taken(name: str) -> bool:
        return models.registry.is_base_model(name) or name in models.lora_requests

    skills = Skills(
        connect(engine), engine.scheduler, settings.skills, settings.resident, taken, events
    )
    metrics = Metrics(skills, events, engine.counters)
    REGISTRY.register(metrics)
    SkillModels.adopt(models, skills)
    route(client, skills)
    keys = Keys(settings.admin_key, args.api_key or [key for key in [envs.VLLM_API_KEY] if key])
    app.include_router(router(skills, keys, events))
    # Not `add_middleware`: vLLM has put its own together already. This one is the outermost.
    inner = app.middleware_stack or app.build_middleware_stack()
    app.middleware_stack = Middleware(inner, before_metrics=metrics.refresh)
    await skills.scan()
    tasks = [metrics.summarise(), *([skills.watch()] if settings.watch else [])]
    app.state.hotgraft_tasks = [asyncio.ensure_future(task) for task in tasks]
    return app


async def _answer(app: Any, sock: Any, args: Namespace) -> Any:
    """Answer requests; returns what is left to await at the end."""
    config = get_uvicorn_log_config(args)
    more = {} if config is None else {"log_config": config}
    try:
        return await serve_http(
            app,
            sock=sock,
            enable_ssl_refresh=args.enable_ssl_refresh,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
            **more,
        )
    finally:
        for task in app.state.hotgraft_tasks:
            task.cancel()


class Engine:
    """The engine process, from the API process.

    Where it has died, all methods raise vLLM's `EngineDeadError`, as its own requests do.

    Args:
        client: vLLM's; this is called in its event loop.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        """Call a method of all workers, from another thread than the event loop's.

        Raises:
            HotgraftError: the event loop has ended, and with it the server.
        """
        if args and args[0] == "prepared":
            time.sleep(POLL)
        if self._loop.is_closed():
            raise HotgraftError("the server has ended")
        calling = self._answered(self._client.collective_rpc(method, args=args))
        call = asyncio.run_coroutine_threadsafe(calling, self._loop)
        # One that comes while the loop is ending is never answered, and Python's end waits for us.
        while not wait([call], LOOK).done:
            if self._loop.is_closed():
                raise HotgraftError("the server has ended")
        return call.result()

    async def scheduler(self, method: str, *args: Any) -> Any:
        """Call a method of `hotgraft.serve.vllm.core`.

        Raises:
            HotgraftError: what it raised.
        """
        core = self._client.engine_core
        answer = await self._answered(core.call_utility_async("hotgraft", method, list(args)))
        if "error" in answer:
            raise error_of(*answer["error"])
        return answer["value"]

    async def counters(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the scheduler counted, and what each rank did."""
        counted = await self.scheduler("counters")
        return counted, await self._answered(self._client.collective_rpc("hotgraft_switches"))

    async def _answered(self, calling: Coroutine[Any, Any, Any]) -> Any:
        """What the engine answers. vLLM forgets calls that a dying one owes an answer, so that they
        would wait for ever, and the end of the server with them.
        """
        call = asyncio.ensure_future(calling)
        try:
            while not (await asyncio.wait([call], timeout=LOOK))[0]:
                if self._client.errored:
                    raise self._client.dead_error
            return call.result()
        finally:
            call.cancel()
