"""The CUDA kernels as they were built: their machine code, what they link, and that they import."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hotgraft import _native
from hotgraft.errors import BackendError
from hotgraft.kernels import native_cuda

MOVES = ("gather_kernel", "scatter_kernel", "compare_kernel")
SIZES = {"h": 1, "t": 2, "j": 4, "m": 8}
"""Item sizes by the letters that mangled names have for unsigned integers."""


class Kernel(NamedTuple):
    architecture: str
    verb: str
    item_size: int


def output(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def built() -> Path:
    """The extension, where it holds CUDA kernels."""
    if _native.CUDA is None:
        # Without nvcc there are no kernels to look at: absent.cpp stands in, which is tested below.
        pytest.skip("nvcc was absent when the extension was built")
    return Path(_native.__file__)


@pytest.fixture(scope="module")
def cuobjdump() -> Path:
    """Triton's package carries one, and so do most CUDA toolkits."""
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return tool
    tool = shutil.which("cuobjdump")
    assert tool, "install Triton or the CUDA toolkit's cuobjdump"
    return Path(tool)


def per_move(dump: str) -> dict[Kernel, str]:
    """What a dump says of each move kernel, by architecture."""
    found = {}
    for part in re.split(r"^arch = ", dump, flags=re.M)[1:]:
        architecture = part.split(maxsplit=1)[0]
        for function in re.split(r"^\s*Function\s*:?\s*", part, flags=re.M)[1:]:
            name, _, body = function.partition("\n")
            named = re.search(rf"\d({'|'.join(MOVES)})I([htjm])E", name)
            if named:
                found[Kernel(architecture, named[1], SIZES[named[2]])] = body
    return found


@pytest.fixture(scope="module")
def assembly(built, cuobjdump) -> dict[Kernel, str]:
    return per_move(output(cuobjdump, "-sass", built))


@pytest.fixture(scope="module")
def resources(built, cuobjdump) -> dict[Kernel, str]:
    return per_move(output(cuobjdump, "-res-usage", built))


def test_every_kernel_is_there_for_every_architecture(built, cuobjdump, assembly, resources):
    assert _native.cuda.ARCHITECTURES is not None
    wanted = {f"sm_{name.partition('-')[0]}" for name in _native.cuda.ARCHITECTURES.split()}
    kernels = {Kernel(a, v, s) for a in wanted for v in MOVES for s in SIZES.values()}
    assert set(assembly) == kernels == set(resources)
    assert re.search(r"\.ptx$", output(cuobjdump, "--list-ptx", built), re.M)


def test_moves_use_registers_only(assembly, resources):
    for kernel, body in resources.items():
        assert re.search(r"\bSTACK:0 .*\bLOCAL:0\b", body), f"{kernel}: {body}"
        assert int(re.search(r"\bREG:(\d+)", body)[1]) <= 64, f"{kernel}: {body}"
    for kernel, body in assembly.items():
        assert not re.findall(r"\b(?:LDL|STL)\b.*", body), kernel


def test_moves_load_16_bytes_at_a_time(assembly):
    """Two loads of positions; values where a thread has 16 bytes of them, stored so by gather."""
    for kernel, body in assembly.items():
        values = kernel.item_size * 8 // 16
        once = 2 + (0 if kernel.verb == "gather_kernel" else values)
        # scatter has its code twice, for either of two moves.
        copies = 2 if kernel.verb == "scatter_kernel" else 1
        assert len(re.findall(r"\bLDG\.E\.128\b", body)) == once * copies, kernel
        if kernel.verb == "gather_kernel":
            # The assembler parts one where registers do not line up.
            assert len(re.findall(r"\bSTG\.E\.128\b", body)) >= values - 1, kernel


def test_no_access_asks_which_memory_it_is_in(assembly):
    for kernel, body in assembly.items():
        assert not re.findall(r"\s(?:LD|ST)\.E\b.*", body), kernel


WIDTHS = {1: r"\.U8", 2: r"\.U16", 4: "", 8: r"\.64"}


def straight_runs(body: str) -> list[list[str]]:
    """The instructions, parted where the code branches."""
    runs: list[list[str]] = [[]]
    for line in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?;)", body, re.M):
        if re.search(r"\b(BRA|BSYNC|BSSY|EXIT|RET|CALL)\b", line):
            runs.append([])
        else:
            runs[-1].append(line)
    return runs


def test_eight_stores_follow_one_another(assembly):
    """A thread's cells are written in one straight run of code, in each of the two moves."""
    for kernel, body in assembly.items():
        if kernel.verb == "scatter_kernel":
            store = rf"STG\.E{WIDTHS[kernel.item_size]} "
            counts = [sum(bool(re.match(store, i)) for i in run) for run in straight_runs(body)]
            assert [n for n in counts if n] == [8, 8], kernel


def test_eight_loads_are_under_way_at_once(assembly):
    """A thread's cells are the last that it loads; none is looked at before all are asked for."""
    for kernel, body in assembly.items():
        if kernel.verb == "scatter_kernel":
            continue
        load = rf"LDG\.E{WIDTHS[kernel.item_size]} R(\d+)"
        run = [run for run in straight_runs(body) if any(re.match(load, i) for i in run)][-1]
        loads = [i for i, line in enumerate(run) if re.match(load, line)][-8:]
        assert len(loads) == 8, kernel
        for at in loads:
            register = int(re.match(load, run[at])[1])
            for used in range(register, register + max(1, kernel.item_size // 4)):
                meanwhile = "\n".join(run[at + 1 : loads[-1]])
                assert not re.search(rf"\bR{used}\b", meanwhile), f"{kernel}: R{used}\n{meanwhile}"


def test_the_extension_needs_neither_the_cuda_runtime_nor_torch(built):
    needed = output("ldd", built)
    assert not re.findall(r"lib(?:cuda|torch|c10|nv)\S*", needed)
    undefined = output("nm", "-D", "--undefined-only", built)
    assert not re.findall(r"\b(?:cuda[A-Z]|cu[A-Z]|__cuda)\w*", undefined)


@pytest.mark.usefixtures("built")
def test_the_build_says_what_it_is():
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", _native.CUDA)
    for name in _native.cuda.ARCHITECTURES.split():
        assert re.fullmatch(r"\d+[af]?(-real|-virtual)?", name)


# ---- where it does not run -----------------------------------------------------------------------


def test_importing_wakes_no_gpu():
    """The extension and the backend's module load without asking for a device."""
    code = (
        "from hotgraft.kernels import native_cuda; import torch; print(torch.cuda.is_initialized())"
    )
    assert output(sys.executable, "-c", code).strip() == "False"


STATUSES = [
    ((-1, "hotgraftCudaNotBuilt", "not here", 0, 0, 0), None, "not here.*'triton'"),
    ((35, "cudaErrorInsufficientDriver", "old", 0, 13000, 0), "13.0", "no NVIDIA driver"),
    ((35, "cudaErrorInsufficientDriver", "old", 12080, 13000, 0), "13.0", "12.8.*13.0.*'triton'"),
    ((100, "cudaErrorNoDevice", "no device", 13000, 13000, 0), "13.0", r"no device \(cudaError"),
    ((0, "cudaSuccess", "fine", 13000, 13000, 0), "13.0", "no CUDA device is visible"),
]


@pytest.mark.parametrize(("status", "toolkit", "wanted"), STATUSES)
def test_why_it_does_not_run(monkeypatch, status, toolkit, wanted):
    monkeypatch.setattr(_native.cuda, "status", lambda: status)
    monkeypatch.setattr(_native, "CUDA", toolkit)
    assert re.search(wanted, native_cuda.why_not())
    with pytest.raises(BackendError, match=wanted):
        native_cuda.open_backend(torch.device("cuda", 0))


def test_it_runs_where_there_is_a_device(monkeypatch):
    monkeypatch.setattr(_native.cuda, "status", lambda: (0, "cudaSuccess", "", 13000, 13000, 1))
    monkeypatch.setattr(_native, "CUDA", "13.0")
    assert native_cuda.why_not() is None
    with pytest.raises(BackendError, match=r"'cpu'|no CUDA device"):
        native_cuda.open_backend(torch.device("cpu"))


def test_a_status_can_always_be_asked():
    code, name, sentence, driver, runtime, devices = _native.cuda.status()
    assert (code == 0) == (name == "cudaSuccess")
    assert sentence
    assert driver >= 0
    assert (runtime == 0) == (_native.CUDA is None)
    assert devices >= 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (((16, 16, 16, 0), 2, 16, 0), "a table has entries"),
        (((16, 16, 16, 5), 3, 16, 0), "item_size must be"),
        (((16, 0, 16, 5), 2, 16, 0), "an address is 0"),
        (((16, 16, 18, 5), 2, 16, 0), "no multiple"),
        (((16, 16, 16, 5), 4, 18, 0), "multiple of item_size"),
    ],
)
def test_arguments_are_checked(arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        _native.cuda.gather(*arguments)


def test_too_many_moves_are_refused():
    with pytest.raises(ValueError, match="one or two"):
        _native.cuda.scatter([((16, 16, 16, 5), 16)] * 3, 2, 0)
    with pytest.raises(ValueError, match="one or two"):
        _native.cuda.scatter([], 2, 0)


def test_a_launch_that_cannot_be_names_its_code():
    if native_cuda.why_not() is None:
        # Where a GPU is, the kernel would run, and a bad address ends the process's use of it.
        pytest.skip("there is a device, and the addresses are made up")
    with pytest.raises(RuntimeError, match=r"^(cudaError|hotgraft)\w+ \(-?\d+\): "):
        _native.cuda.gather((16, 16, 16, 5), 2, 16, 0)
