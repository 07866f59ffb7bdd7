"""Models by their spec, and checkpoints that bring a compressed model back.

MODEL is `path/to/file.py:callable`, `package.module:callable` (the callable returns an `nn.Module`), a
`.pt2` file (torch.export), the folder of a causal model (config.json and its weights), or a checkpoint that
edgecomp wrote.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pickle
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecomp.errors import EdgecompError, MissingError, ModelError
from edgecomp.graph.capture import check_finite
from edgecomp.spec import DataSource, TensorSpec

_LAYOUTS = {4: "NCHW", 2: "NC"}
_WAY_OUT = "give path/to/file.py:callable, package.module:callable, a .pt2 file, or a model's folder"


def load_model(spec: str, weights: Path | None = None) -> nn.Module:
    """The module that MODEL names, in eval mode, with finite weights.

    `weights`: a state dict written by `torch.save`, or one under the key `state_dict` or `model`; it is read
    with `weights_only=True`. What the user's code prints goes to stderr: stdout belongs to results.
    Raises ModelError when anything is missing, is no module, or holds NaN or Inf.
    """
    with redirect_stdout(sys.stderr):
        module = _module(spec)
    if weights is not None:
        load_weights(module, weights)
    check_finite(module)
    return module.eval()


def _module(spec: str) -> nn.Module:
    path, _, attribute = spec.rpartition(":")
    if spec.endswith(".pt2"):
        return _exported(Path(spec))
    if is_folder(spec):
        return _from_folder(Path(spec))
    if path.endswith(".py"):
        return _built(_module_from_file(Path(path)), attribute, spec)
    if path and all(part.isidentifier() for part in path.split(".")):
        return _built(_module_from_package(path), attribute, spec)
    raise ModelError(f"model {spec!r} is not a model that edgecomp can load; {_WAY_OUT}")


def is_folder(spec: str) -> bool:
    """True for the folder of a model of transformers."""
    return (Path(spec) / "config.json").is_file()


def _from_folder(folder: Path) -> nn.Module:
    try:
        loading = importlib.import_module("edgecomp.language.folder")
    except ModuleNotFoundError as error:
        raise MissingError(
            f"{folder} needs {error.name}, which is not installed: pip install transformers"
        ) from error
    module: nn.Module = loading.load(folder)
    return module


def resolved(spec: str) -> str:
    """MODEL with the file's path made absolute, so that a checkpoint can name it from any folder."""
    path, colon, attribute = spec.rpartition(":")
    if spec.endswith(".pt2") or is_folder(spec):
        return str(Path(spec).resolve())
    if path.endswith(".py"):
        return f"{Path(path).resolve()}{colon}{attribute}"
    return spec


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict into a module; names and shapes must fit. Raises ModelError."""
    facts = read_tensors(path)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(facts, Mapping) and isinstance(facts.get(key), Mapping):
            facts = facts[key]
    if not isinstance(facts, Mapping) or not all(isinstance(t, Tensor) for t in facts.values()):
        raise ModelError(
            f"{path} holds no state dict; expected names and tensors, as torch.save(m.state_dict())"
        )
    state = {name.removeprefix("module."): tensor for name, tensor in facts.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ModelError(f"{path} does not fit {type(module).__name__}: {' '.join(lines)[:300]}") from error


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, tensors and plain values only. Raises ModelError when it is anything else."""
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}; expected a file written by torch.save")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"{path} is not a checkpoint of tensors and plain values ({type(error).__name__}); it is damaged "
            "or holds Python objects, which are never executed: save m.state_dict() instead of m"
        ) from error


def input_specs(module: nn.Module, source: DataSource) -> tuple[TensorSpec, ...]:
    """The model's inputs, batch 1: names from `forward`, shapes and dtypes from the first sample of data."""
    batch = next(iter(source.batches(1)), None)
    if batch is None:
        raise ModelError("the inputs of the model are read from the first sample, and the data is empty")
    return specs_of(module, batch.inputs)


def specs_of(module: nn.Module, arrays: Sequence[np.ndarray]) -> tuple[TensorSpec, ...]:
    """The model's inputs for example arrays of batch 1: names from `forward`, in order."""
    specs = []
    for name, array in zip(_argument_names(module, len(arrays)), arrays, strict=True):
        layout: Any = _LAYOUTS.get(array.ndim, "") if array.dtype.kind == "f" else ""
        specs.append(TensorSpec(name, tuple(array.shape), str(array.dtype), layout))
    return tuple(specs)


def check_inputs(module: nn.Module, inputs: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    """Run the module once on zeros; returns the first output's shape. Raises ModelError when it fails."""
    zeros = [torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in inputs]
    try:
        with torch.no_grad():
            result = module(*zeros)
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} does not run on inputs of shape {[s.shape for s in inputs]}: "
            f"{str(error).strip().splitlines()[0][:200]}; check the data's shape and preprocessing"
        ) from error
    values = list(result.values()) if isinstance(result, Mapping) else result
    first = values[0] if isinstance(values, list | tuple) else values
    if not isinstance(first, Tensor):
        raise ModelError(f"{type(module).__name__} returns {type(first).__name__}; expected tensors")
    return tuple(first.shape)


def _argument_names(module: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [p.name for p in parameters if p.kind in kinds]
    return [*names, *(f"input_{i}" for i in range(len(names), count))][:count]


def _exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"no model at {path}; expected a .pt2 file written by torch.export.save")
    try:
        module = torch.export.load(path).module(check_guards=False)
    except Exception as error:
        raise ModelError(
            f"{path} is not a model written by torch.export.save of this torch ({torch.__version__}): "
            f"{str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__}"
        ) from error
    for name in ("train", "eval"):  # torch forbids both on exported modules; ours only sets the flag
        module.__dict__.pop(name, None)
    return module


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"no file at {path}; {_WAY_OUT}")
    file = path.resolve()
    name = f"edgecomp_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise ModelError(f"{path} cannot be imported as Python; {_WAY_OUT}")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        with _user_code(str(path), file.parent):
            found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_from_package(name: str) -> ModuleType:
    with _user_code(name, Path.cwd()):
        return importlib.import_module(name)


def _built(module: ModuleType, attribute: str, spec: str) -> nn.Module:
    if not hasattr(module, attribute):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        close = difflib.get_close_matches(attribute, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"callables are: {', '.join(known[:10]) or 'none'}"
        raise ModelError(f"model {spec!r} names {attribute!r}, which is not there; {hint}")
    value = getattr(module, attribute)
    if not isinstance(value, nn.Module) and callable(value):
        folder = Path(module.__file__ or ".").resolve().parent
        with _user_code(spec, folder):
            value = value()
    if not isinstance(value, nn.Module):
        raise ModelError(f"model {spec!r} gives a {type(value).__name__}; expected a torch.nn.Module")
    return value


@contextmanager
def _user_code(what: str, folder: Path) -> Iterator[None]:
    """Imports of the folder work inside; an error is one sentence with the user's own file and line."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except EdgecompError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"model {what!r} failed with {type(error).__name__}: {error} ({place.filename}:{place.lineno}); "
            "run it in Python to see the whole traceback, or add --debug"
        ) from error
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
