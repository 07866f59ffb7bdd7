"""The recipe: a YAML file that says what to compress, how, for which targets, and what must hold.

Read by the safe loader, checked whole before any work. A message names the file, the line, the key and the
nearest valid one. `json_schema()` is the same schema for editors.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edgecomp import plain_yaml, recipe_gates, registry
from edgecomp.errors import EdgecompError, MissingError, RecipeError
from edgecomp.parity import gates as gating
from edgecomp.parity.metric_named import by_name
from edgecomp.recipe_gates import Gates
from edgecomp.spec import Preprocessing

_STRICT = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
_ENTRY_KEYS = ("gates", "on_failure")


class _Refused(ValueError):
    """Carries an error of ours through pydantic, so that it gets its line."""

    def __init__(self, error: EdgecompError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _with_line() -> Iterator[None]:
    try:
        yield
    except EdgecompError as error:
        raise _Refused(error) from error


OnFailure = Literal["stop", "rollback", "continue"]


class DataEntry(BaseModel):
    """One role of data: where it is, and how pictures become arrays."""

    model_config = _STRICT
    source: str = Field(description="Folder, .npz, .npy, CSV, or path/to/file.py:callable")
    preprocessing: dict[str, Any] | None = None
    limit: int | None = Field(None, ge=1, description="Use the first samples only")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("preprocessing")
    @classmethod
    def _known(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            with _with_line():
                _preprocessing(value)
        return value

    def decided(self) -> Preprocessing | None:
        return None if self.preprocessing is None else _preprocessing(self.preprocessing)


class DataEntries(BaseModel):
    """The roles of data. Evaluation is needed; steps say when they lack another."""

    model_config = _STRICT
    train: DataEntry | None = None
    calibration: DataEntry | None = None
    evaluation: DataEntry


class StepEntry(BaseModel):
    """One step: `prune: {sparsity: 0.3}`, with `gates` and `on_failure` beside it where wanted."""

    model_config = _STRICT
    name: str
    settings: dict[str, Any] = {}
    gates: Gates = ()
    on_failure: OnFailure = "stop"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return _named(value, "step", _ENTRY_KEYS)

    @model_validator(mode="after")
    def _buildable(self) -> StepEntry:
        with _with_line():
            self.build(0)
            gating.parse_all(self.gates)
        return self

    def build(self, seed: int) -> Any:
        """The step itself; `seed` is the recipe's, for steps that have a seed and were given none.

        Raises UnknownNameError, RecipeError, MissingError.
        """
        factory, settings = registry.load("steps", self.name), dict(self.settings)
        if dataclasses.is_dataclass(factory) and "seed" in {f.name for f in dataclasses.fields(factory)}:
            settings.setdefault("seed", seed)
        return with_settings(factory, settings, f"step {self.name!r}")


class ExportEntry(BaseModel):
    """One target: `tflite-int8`, or `coreml-pal4: {group_size: 16}`."""

    model_config = _STRICT
    target: str
    settings: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        named = _named(value, "export", ())
        return {"target": named["name"], "settings": named["settings"]} if "name" in named else named

    @field_validator("target")
    @classmethod
    def _registered(cls, value: str) -> str:
        with _with_line():
            registry.entry("exporters", value)
        return value


class ProfileEntry(BaseModel):
    """How artifacts are measured, and on which devices of the inventory (`local` is this machine)."""

    model_config = _STRICT
    devices: tuple[str, ...] = ("local",)
    threads: int = Field(default=1, ge=1)
    runs: int = Field(default=50, ge=1)
    seconds: float = Field(default=1.0, ge=0)
    warmup_seconds: float = Field(default=5.0, ge=0)


Objective = Literal["metric", "size_bytes", "latency_ms", "macs"]
Space = Literal["optional"] | tuple[float | int, float | int] | dict[Literal["choice"], list[Any]]


class SearchEntry(BaseModel):
    """What `edgecomp search` varies: `steps.0.macs: [0.3, 0.9]`, `{choice: [..]}`, `steps.1: optional`."""

    model_config = _STRICT
    trials: int = Field(default=20, ge=1)
    space: dict[str, Space] = Field(min_length=1)
    objectives: tuple[Objective, ...] = Field(default=("metric", "size_bytes"), min_length=1)


class Recipe(BaseModel):
    """A whole recipe."""

    model_config = _STRICT
    name: str = ""
    model: str = Field(description="path/to/file.py:callable, package.module:callable, or a .pt2 file")
    weights: Path | None = Field(None, description="A state dict to load into the model")
    data: DataEntries
    metric: str | None = Field(None, description="Such as accuracy; by the data's targets when left out")
    seed: int = 0
    steps: tuple[StepEntry, ...] = ()
    exports: tuple[ExportEntry, ...] = ()
    gates: Gates | dict[str, Gates] = ()
    parity: bool = True
    profile: ProfileEntry | None = ProfileEntry()
    search: SearchEntry | None = None

    @model_validator(mode="before")
    @classmethod
    def _all_gates(cls, value: Any) -> Any:
        """`gates: {max_drop: 0.01}` holds for all artifacts."""
        if isinstance(value, dict) and isinstance(value.get("gates"), dict):
            return {**value, "gates": recipe_gates.by_target(value["gates"])}
        return value

    @model_validator(mode="after")
    def _measurable(self) -> Recipe:
        """Gates on a profile name a device that the recipe profiles on."""
        named = [self.gates] if isinstance(self.gates, tuple) else list(self.gates.values())
        with _with_line():
            recipe_gates.check_devices(
                [e for exprs in named for e in exprs],
                [e for step in self.steps for e in step.gates],
                self.profile.devices if self.profile else (),
                bool(self.exports),
            )
        return self

    def gates_of(self, target: str) -> tuple[str, ...]:
        """Conditions on one target's artifact: those of all, and its own."""
        if isinstance(self.gates, tuple):
            return self.gates
        return (*self.gates.get("all", ()), *self.gates.get(target, ()))

    @field_validator("metric")
    @classmethod
    def _named_metric(cls, value: str | None) -> str | None:
        if value is not None:
            with _with_line():
                by_name(value)
        return value

    @field_validator("gates")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        with _with_line():
            for name, exprs in value.items() if isinstance(value, dict) else [("all", value)]:
                gating.check_names(exprs, profiled=True)
                if name != "all":
                    registry.entry("exporters", name)
        return value


@dataclass(frozen=True)
class Document:
    """A recipe as it was read: the checked values, the plain data, the hash of the file's bytes."""

    recipe: Recipe
    plain: Mapping[str, Any]
    sha256: str
    path: Path


def read(path: Path) -> Document:
    """Read and check a recipe. Raises RecipeError, UnknownNameError or MissingError (a step's library)."""
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}; expected a YAML file, as `edgecomp init MODEL` writes it")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
        node = yaml.compose(text, Loader=plain_yaml.Loader)
        plain = plain_yaml.load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text; expected a YAML recipe") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(plain, dict):
        raise RecipeError(f"{path} holds {type(plain).__name__}; expected keys such as model, data and steps")
    recipe = validated(plain, path, _lines(node))
    return Document(recipe, plain, hashlib.sha256(raw).hexdigest(), path)


def validated(plain: Mapping[str, Any], path: Path, lines: Mapping[Any, int] | None = None) -> Recipe:
    """A recipe from plain data. Raises as `read` does; messages name `path`."""
    try:
        return Recipe.model_validate(plain)
    except pydantic.ValidationError as error:
        raise _refusal(path, error, lines or {}) from error


def with_settings(factory: Any, settings: Mapping[str, Any], what: str, **fixed: Any) -> Any:
    """Make a dataclass from settings, each key and type checked. Raises RecipeError with the nearest key.

    A factory that is no dataclass is called with the settings as they are.
    """
    if not dataclasses.is_dataclass(factory):
        return _called(factory, {**settings, **fixed}, what)
    model = settings_model(factory, tuple(fixed))
    try:
        checked = model.model_validate(dict(settings))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"{what} has no setting {key!r}; {_nearest(key, model.model_fields)}"
            ) from error
        raise RecipeError(f"{what}: {key} is {first['input']!r}; {_lower(first['msg'])}") from error
    values = {name: getattr(checked, name) for name in checked.model_fields_set}
    return _called(factory, {**values, **fixed}, what)


def settings_model(factory: Any, leave_out: tuple[str, ...] = ()) -> type[BaseModel]:
    """A pydantic model of a dataclass's fields, unknown keys forbidden."""
    hints = get_type_hints(factory)
    fields: dict[str, Any] = {}
    for each in dataclasses.fields(factory):
        if not each.init or each.name in leave_out:
            continue
        default: Any = each.default
        if each.default_factory is not dataclasses.MISSING:
            default = Field(default_factory=each.default_factory)
        elif each.default is dataclasses.MISSING:
            default = ...
        fields[each.name] = (hints[each.name], default)
    model: type[BaseModel] = pydantic.create_model(factory.__name__, __config__=_STRICT, **fields)
    return model


def json_schema() -> dict[str, Any]:
    """JSON Schema of recipes, with the settings of every step that is installed here."""
    schema = Recipe.model_json_schema()
    recipe_gates.for_editors(schema["properties"]["gates"])
    definitions = schema.setdefault("$defs", {})
    choices: list[dict[str, Any]] = []
    beside = {k: StepEntry.model_json_schema()["properties"][k] for k in _ENTRY_KEYS}
    for name in registry.names("steps"):
        factory = registry.load("steps", name)
        if dataclasses.is_dataclass(factory):
            definitions[f"step-{name}"] = settings_model(factory).model_json_schema()
            keys = {name: {"$ref": f"#/$defs/step-{name}"}, **beside}
            choices.append(
                {"type": "object", "properties": keys, "required": [name], "additionalProperties": False}
            )
    choices.append({"type": "string", "enum": registry.names("steps")})
    targets = registry.names("exporters")
    each = {"type": "object", "propertyNames": {"enum": targets}, "minProperties": 1, "maxProperties": 1}
    definitions["StepEntry"] = {"anyOf": choices}
    definitions["ExportEntry"] = {"anyOf": [{"type": "string", "enum": targets}, each]}
    definitions["DataEntry"] = {"anyOf": [{"type": "string"}, definitions["DataEntry"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "edgecomp recipe", **schema}


def _named(value: Any, kind: str, beside: tuple[str, ...]) -> Any:
    """`name`, or `{name: settings}` with keys beside it -> `{name, settings, ...}`."""
    if isinstance(value, str):
        return {"name": value, "settings": {}}
    if not isinstance(value, dict):
        raise ValueError(f"expected a {kind}'s name, or its name and settings")
    names = [key for key in value if key not in beside]
    if len(names) != 1:
        raise ValueError(f"expected one {kind} in each list entry, found {names}; put each on its own line")
    settings = value[names[0]]
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"settings of {names[0]!r} are {settings!r}; expected keys and values")
    return {"name": names[0], "settings": settings or {}, **{k: value[k] for k in beside if k in value}}


def _preprocessing(facts: Mapping[str, Any]) -> Preprocessing:
    result: Preprocessing = with_settings(Preprocessing, facts, "preprocessing")
    return result


def _called(factory: Any, settings: Mapping[str, Any], what: str) -> Any:
    try:
        return factory(**settings)
    except EdgecompError as error:
        raise type(error)(f"{what}: {error}") if type(error) is RecipeError else error from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what}: {error}") from error


def _lines(node: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    """Path in the document -> line number, from 1."""
    if node is None:
        return {}
    found = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found.update(_lines(value, (*path, key.value)))
            found[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found.update(_lines(value, (*path, index)))
    return found


def _refusal(path: Path, error: pydantic.ValidationError, lines: Mapping[Any, int]) -> EdgecompError:
    """One paragraph on one error: file, line, key, what was found and expected. Unknown keys come first:
    a missing key is often a misspelt one."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    text = _paragraph(path, first, lines, cause)
    return (
        MissingError(text) if isinstance(getattr(cause, "error", None), MissingError) else RecipeError(text)
    )


def _paragraph(path: Path, first: Any, lines: Mapping[Any, int], cause: Exception | None) -> str:
    loc = tuple(first["loc"])
    known = loc
    while known and known not in lines:
        known = known[:-1]
    where = f"{path}:{lines.get(known, 1)}"
    key = ".".join(str(part) for part in known)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {loc[-1]!r}; {_nearest(str(loc[-1]), _keys_at(loc[:-1]))}"
    if first["type"] == "missing":
        return f"{where}: key {'.'.join(map(str, loc))!r} is missing; every recipe needs it"
    if cause is not None:
        return f"{where}: {cause}"
    return f"{where}: {key} is {first['input']!r}; {_lower(first['msg'])}"


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        found = _model_in(annotation)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _nearest(name: str, known: Any) -> str:
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
