"""The command `serve`: vLLM's OpenAI server, with the skills of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hotgraft.arguments import size
from hotgraft.console import Output

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""How to register it: what it does not know is vLLM's."""


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's folder or name; comes first.")
    ],
    skills: Annotated[
        Path,
        typer.Option(
            metavar="DIR", exists=True, file_okay=False, help="The folder of *.graft.safetensors."
        ),
    ],
    resident: Annotated[
        int,
        typer.Option(
            metavar="SIZE",
            parser=size,
            help="Memory for loaded skills, on all ranks together; the others stay on disk.",
        ),
    ] = "2GiB",  # type: ignore[assignment]  # typer parses it
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep up with files that come, change and go.")
    ] = False,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="HOTGRAFT_ADMIN_KEY",
            show_envvar=True,
            help="Let requests with this key load, pin and unload skills.",
        ),
    ] = None,
    quantum: Annotated[
        int | None, typer.Option(help="Steps of a turn while other skills wait. Default: 8.")
    ] = None,
    max_wait: Annotated[
        float | None, typer.Option(help="Seconds after which one that waits cuts in. Default: 1.")
    ] = None,
) -> None:
    """Serve MODEL with vLLM: requests name a skill of the folder as their model.

    All other options are those of vLLM's server; it listens on 127.0.0.1 unless --host is given.
    """
    if model.startswith("-"):
        raise typer.BadParameter(f"it comes first, before {model}", param_hint="MODEL")
    if admin_key is not None and not admin_key:
        raise typer.BadParameter("it is empty", param_hint="--admin-key")
    with Output(as_json=False):
        try:
            from hotgraft.serve.vllm import server
        except ImportError as error:
            raise _not_there(error) from error
        given = {"quantum": quantum, "max_wait": max_wait}
        rules = {name: value for name, value in given.items() if value is not None}
        settings = server.Settings(skills.absolute(), resident, watch, admin_key, rules)
        server.serve(server.parse(model, context.args, settings), settings)


def _not_there(error: ImportError) -> Exception:
    from hotgraft.errors import BackendError

    return BackendError(f"this needs vLLM 0.32, which cannot be imported here: {error}")
