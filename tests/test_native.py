"""The native tests: built without Python under AddressSanitizer and UBSan, and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"native_tests": 12, "grid_tests": 2, "rank_tests": 5}
"""Each with the least number of tests that it runs."""


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
        "HOTGRAFT_CUDA_ARCHITECTURES=90",  # where nvcc is: for its warnings, one will do
        "HOTGRAFT_NATIVE_TESTS=ON",
        "HOTGRAFT_WERROR=ON",
    )
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *(f"-D{o}" for o in options))
    run("cmake", "--build", tmp_path)
    for name, least in PROGRAMS.items():
        printed = run(
            tmp_path / name,
            ASAN_OPTIONS="detect_leaks=0:abort_on_error=0",
            UBSAN_OPTIONS="print_stacktrace=1",
        ).splitlines()
        source = (ROOT / "tests" / "native" / f"{name}.cpp").read_text()
        listed = re.findall(r'\{"([\w ]+)", \w+\},', source)
        assert printed == [*listed, "all passed"]
        assert len(listed) >= least
