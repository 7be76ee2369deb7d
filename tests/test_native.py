"""The native tests: built without Python under AddressSanitizer and UBSan, and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "native" / "native_tests.cpp"


def run(*command: object, **environment: str) -> str:
    """A command's output; fails with all of it."""
    # The tools of the test extra are next to this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ | {"PATH": path} | environment,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-8000:]}"
    return done.stdout


def test_native(tmp_path):
    options = (
        "CMAKE_BUILD_TYPE=Debug",
        "HOTGRAFT_PYTHON=OFF",
        "HOTGRAFT_NATIVE_TESTS=ON",
        "HOTGRAFT_WERROR=ON",
    )
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *(f"-D{o}" for o in options))
    run("cmake", "--build", tmp_path)
    printed = run(
        tmp_path / "native_tests",
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    ).splitlines()
    listed = re.findall(r'^        \{"(.*?)", \w+\},$', SOURCE.read_text(), re.M)
    assert printed == [*listed, "all passed"]
    assert len(listed) >= 12
