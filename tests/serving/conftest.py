"""Shared by the tests in vLLM's environment."""

import os
import sys
from pathlib import Path

# Not the repository's root, which has a `triton_kernels` that vLLM would take for Triton's.
sys.path.append(str(Path(__file__).parents[2] / "bench" / "serving"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # for toys, and on few cores: waiting for each other would take longest
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process; workers, if several, not
    VLLM_LOGGING_LEVEL="ERROR",
)
