"""Anonymous resident memory, of this process and of children that do one thing each.

Mapped file pages are the system's and do not count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_PERIOD_S = 0.0005


def anonymous(process: int) -> int:
    """Bytes of anonymous resident memory of a process, quick to read; off by half a MiB at most."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def settled() -> int:
    """That of this process, exactly, once everything free is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    if found is None:
        raise OSError("the kernel does not tell how much memory is anonymous")
    return int(found[1]) * 1024


def serve(work: Callable[[], dict[str, Any]]) -> None:
    """In the child: say that all is prepared, wait for the word, work, tell the result."""
    settled()
    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, **result}), flush=True)
    sys.stdin.readline()


def watch_child(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module that calls `serve`; its result, and by how much its memory grew at most.

    The peak is sampled from outside, twice a millisecond, so that the child is not disturbed.

    Raises:
        RuntimeError: the child failed.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"{module} failed before it was ready")
        before = peak = anonymous(child.pid)
        child.stdin.write("go\n")
        line: list[str] = []
        stdout = child.stdout
        reader = threading.Thread(target=lambda: line.append(stdout.readline()), daemon=True)
        reader.start()
        while reader.is_alive():
            peak = max(peak, anonymous(child.pid))
            time.sleep(_PERIOD_S)
        if not line[0]:
            raise RuntimeError(f"{module} failed while it worked")
        child.stdin.write("done\n")
    return {"growth": peak - before, **json.loads(line[0])}
