"""Open a task: its texts, its model and its read-out, as a task file names them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hotgraft.errors import FormatError, HotgraftError
from hotgraft.tasks.readout import Head, Prototypes, Readout
from hotgraft.tasks.rows import read_split
from hotgraft.tasks.taskfile import TaskFile
from hotgraft.tasks.texts import Split
from hotgraft.weights import Weights, open_weights, sample


@dataclass(frozen=True, eq=False)
class Task:
    """A task, ready to be localized: `localize(base, finetuned, readout.loss, batches)`."""

    base: nn.Module
    """In evaluation mode, with the base's weights, in the type that they are stored in."""
    finetuned: Weights
    """A path where its names are the model's own, or a state dict with those."""
    readout: Readout
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    """The labels, in the order of the logits."""


def open_task(file: TaskFile) -> Task:
    """Read what a task file names: texts first, then the model. Nothing is downloaded or unpickled.

    Raises:
        DataError: the texts cannot be used.
        FormatError: transformers does not make a whole model of the base's folder, its read-out
            is not there, or its head's classes cannot be told apart by name and number.
        HotgraftError: transformers is not installed.

    Example: `open_task(read_task("debian.toml")).train.texts[0]`.
    """
    transformers = _transformers()
    with _explained(file.base, "configuration"):
        config = transformers.AutoConfig.from_pretrained(file.base, local_files_only=True)
    classes = _classes(file, config)
    class_of = _numbering(file, classes)
    train = read_split(file.train, file.text, file.label, class_of)
    test = None
    if file.test is not None:
        test = read_split(file.test, file.text, file.label, class_of)
    with _explained(file.base, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.base, local_files_only=True)
    _check_tokenizer(file, tokenizer, config)

    kind = "AutoModel" if file.kind == "prototypes" else "AutoModelForSequenceClassification"
    base, missing = _model(getattr(transformers, kind), file.base)
    if missing:
        raise FormatError(
            f"{file.base}: {kind} wants {sample(missing)}, which its weights lack, and would make "
            f"them up; a base for the read-out {file.kind!r} has all of them"
        )
    readout: Readout
    if file.kind == "head":
        if getattr(base.config, "pad_token_id", None) is None:  # a decoder's head looks for it
            base.config.pad_token_id = tokenizer.pad_token_id
        readout = Head(tokenizer=tokenizer, max_tokens=file.max_tokens)
    else:
        readout = Prototypes.from_base(
            base,
            tokenizer,
            tuple(file.classes.values()),
            temperature=file.temperature,
            max_tokens=file.max_tokens,
        )
    return Task(base, _finetuned(file.finetuned, base), readout, train, test, classes)


def write_weights(model: nn.Module, source: Weights) -> None:
    """Write weights into a model, by name; what the source does not name stays as it is.

    Example: `write_weights(task.base, task.finetuned)`.
    """
    with open_weights(source) as checkpoint, torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in checkpoint.known:
                tensor.copy_(checkpoint.tensor(name).view(checkpoint.known[name].shape))


def _classes(file: TaskFile, config: Any) -> tuple[str, ...]:
    """The labels, in the order of the logits."""
    if file.kind == "prototypes":
        return tuple(file.classes)
    names: Mapping[int, object] = config.id2label
    if len(names) < 2:
        raise FormatError(f"{file.base}: its head has {len(names)} class; wanted two or more")
    classes = tuple(str(names[i]) for i in sorted(names))
    _check_names(file.base, classes)
    return classes


def _check_names(base: Path, classes: Sequence[str]) -> None:
    """Refuse names by which a label could be one class or another: texts may also give numbers."""
    for i, name in enumerate(classes):
        first = classes.index(name)
        if first != i:
            raise FormatError(
                f"{base}: its head calls both class {first} and class {i} {name!r}; give each a "
                "name of its own in id2label of config.json"
            )
        if name in map(str, range(len(classes))) and name != str(i):
            raise FormatError(
                f"{base}: its head calls class {i} {name!r}, which is the number of another; give "
                "it a name that is no number in id2label of config.json"
            )


def _numbering(file: TaskFile, classes: tuple[str, ...]) -> Callable[[str], int]:
    """The class of a label: by its name, or for a head by its number too."""
    numbers = {label: i for i, label in enumerate(classes)}
    if file.kind == "head":
        numbers = {str(i): i for i in range(len(classes))} | numbers
        where = f"{file.base}'s head"
    else:
        where = f"[readout.classes] of {file.path}"

    def class_of(label: str) -> int:
        if label not in numbers:
            raise LookupError(
                f"the label {label!r} has no class; {where} has {sample(list(classes), most=8)}"
            )
        return numbers[label]

    return class_of


def _check_tokenizer(file: TaskFile, tokenizer: Any, config: Any) -> None:
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers gives a tokenizer that knows no word where there are no files of one.
        raise FormatError(
            f"{file.base}: its tokenizer knows no word; wanted tokenizer.json or a vocabulary there"
        )
    if tokenizer.pad_token_id is None:
        raise FormatError(
            f"{file.base}: its tokenizer has no padding token; name one in tokenizer_config.json"
        )
    places = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    most = min(places, tokenizer.model_max_length)
    if file.max_tokens > most:
        raise FormatError(
            f"{file.path}: data.max_tokens is {file.max_tokens}; {file.base} takes up to {most}"
        )


def _model(kind: Any, folder: Path) -> tuple[Any, list[str]]:
    """A model in evaluation mode, and the names of the weights that its folder did not have.

    A pooler is no such weight: nobody who embeds texts asks it.
    """
    with _explained(folder, "model"):
        model, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    missing = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
    return model.eval(), sorted(missing)


def _finetuned(path: Path, base: nn.Module) -> Weights:
    """The fine-tuned weights under the base's names. A path costs no memory."""
    with open_weights(path) as checkpoint, open_weights(base) as wanted:
        if set(wanted.specs) <= set(checkpoint.known) or not (path / "config.json").is_file():
            return path
    with _explained(path, "model"):
        # Saved with a head, say: transformers knows what its names are without one.
        model, found = type(base).from_pretrained(  # type: ignore[attr-defined]
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    state: dict[str, torch.Tensor] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in found["missing_keys"]}


@contextlib.contextmanager
def _explained(folder: Path, part: str) -> Iterator[None]:
    """transformers without its bars and warnings, its many errors as one."""
    logging = _transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise FormatError(f"{folder}: transformers finds no {part} in it: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    """It takes seconds to import, so not before it is needed."""
    try:
        import transformers
    except ImportError as error:
        raise HotgraftError(
            f'a task file needs transformers ({error}): pip install "hotgraft[localize]"'
        ) from error
    return transformers
