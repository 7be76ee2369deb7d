"""A server with skills, started as users start it, on loopback: what its tests share."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import hotgraft
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COMMAND = """
import typer
from hotgraft.serve_command import CONTEXT, serve
app = typer.Typer()
app.command(context_settings=CONTEXT)(serve)
if __name__ == "__main__":
    app()
"""
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
OPTIONS = (
    "--enforce-eager", "--max-model-len", "128", "--block-size", "32", "--seed", "0",
    "--served-model-name", "toy", "--dtype", "float32",
)  # fmt: skip
ADMIN_KEY = "a key for tests"
WEIGHTS = "model.safetensors"
PATIENCE = 240.0


def checkpoint(folder: Path, name: str = "llama") -> Path:
    """A toy Llama with a tokenizer of 300 words.

    It is in float32, where the best of 300 tokens is so in any batch.
    """
    base = checkpoints.save(name, folder)
    state = {name: tensor.float() for name, tensor in load_file(base / WEIGHTS).items()}
    save_file(state, base / WEIGHTS, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(base)
    return base


def graft(base: Path, path: Path, seed: int, density: float = 0.1) -> str:
    """Write a skill that changes every tenth weight; returns its digest."""
    state = load_file(base / WEIGHTS)
    made = hotgraft.diff(state, checkpoints.tuned(state, density, seed))
    made.save(path)
    return made.id


class Server:
    """A running server. As a context manager it ends with the block.

    Args:
        folder: where it is started; its log is there.
        model: the checkpoint.
        skills: the folder of skills.
        options: of the command.
        first: what the process does before it runs the command.
        environment: beside the usual.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        skills: Path,
        *options: str,
        first: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        script = folder / "serve.py"
        script.write_text(first + COMMAND)
        self.log = folder / f"server-{self.port}.log"
        given = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_NO_USAGE_STATS": "1",
            **(environment or {}),
        }
        command = [sys.executable, "-P", script, model, "--skills", skills]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command), "--port", str(self.port), *OPTIONS, *options],
                cwd=folder, env=given, stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Server:
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.3)
        raise AssertionError(f"the server does not answer:\n{self.log.read_text()[-6000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def events(self, event: str) -> list[dict[str, Any]]:
        """The lines of the log that are ours, of one kind."""
        lines = [x for x in self.log.read_text().splitlines() if '"logger": "hotgraft"' in x]
        found = [json.loads(line[line.index("{") :]) for line in lines]
        return [line for line in found if line["event"] == event]

    def open(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Begin a request; the response is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, data, given)
        return connection, connection.getresponse()

    def request(self, method: str, path: str, *args: Any) -> tuple[int, Any, dict[str, str]]:
        """The status, the body, and the headers in lower case."""
        connection, response = self.open(method, path, *args)
        with contextlib.closing(connection):
            text = response.read().decode()
            headers = {name.lower(): value for name, value in response.getheaders()}
            kind = headers.get("content-type", "")
            return response.status, json.loads(text) if "json" in kind else text, headers

    def get(self, path: str) -> tuple[int, Any, dict[str, str]]:
        """Of a `GET`."""
        return self.request("GET", path)

    def complete(self, model: str, prompt: str = "w5 w6 w7", count: int = 16, **more: Any) -> Any:
        """The greedy text of a completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0}
        status, found, _ = self.request(
            "POST", "/v1/completions", {**body, "ignore_eos": True, **more}
        )
        assert status == 200, found
        return found["choices"][0]["text"]

    def stream(self, model: str, prompt: str, count: int) -> http.client.HTTPResponse:
        """A streamed completion that has begun."""
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0}
        connection, response = self.open(
            "POST", "/v1/completions", {**body, "ignore_eos": True, "stream": True}
        )
        assert response.status == 200, response.read()
        response.connection = connection
        return response

    def admin(self, method: str, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
        """A request with the admin key."""
        return self.request(method, path, body, {"X-Hotgraft-Admin-Key": ADMIN_KEY})

    def metrics(self) -> dict[str, float]:
        """Our metrics, with their labels."""
        lines = [x for x in self.get("/metrics")[1].splitlines() if x.startswith("hotgraft")]
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines)}


def streamed(response: http.client.HTTPResponse, text: str = "") -> str:
    """The text of a streamed completion; what was read of it before comes first."""
    for line in response:
        if line.startswith(b"data: ") and b"[DONE]" not in line:
            choice = json.loads(line[6:])["choices"][0]
            text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return text
