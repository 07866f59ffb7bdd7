"""Tokenizers that travel with an artifact: text to ids and back, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from edgecomp.errors import InputError, ModelError

_TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")


@dataclass(frozen=True, eq=False)
class Text:
    """A tokenizer. `template`: the chat template (Jinja), or ""; `special`: names of tokens that it uses."""

    coder: Tokenizer
    template: str = ""
    special: Mapping[str, str] | None = None

    @classmethod
    def read(cls, path: Path) -> Text:
        """From `tokenizer.json`, with `tokenizer_config.json` or `chat_template.jinja` beside it if there.

        `path`: the file or its folder. Raises ModelError when it is missing or damaged.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ModelError(f"no tokenizer at {file}; expected the tokenizer.json that the model came with")
        try:
            coder = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file} is no tokenizer of the tokenizers library: {error}") from error
        facts = _config(file.with_name("tokenizer_config.json"))
        apart = file.with_name("chat_template.jinja")
        template = apart.read_text() if apart.is_file() else facts.get("chat_template") or ""
        return cls(coder, template if isinstance(template, str) else "", _special(facts))

    def check(self, vocabulary: int) -> None:
        """Raise ModelError when the tokenizer knows ids that the model has no row for."""
        size = self.coder.get_vocab_size(with_added_tokens=True)
        if size > vocabulary:
            raise ModelError(
                f"the tokenizer has {size} tokens, the model's vocabulary {vocabulary}; it is of another "
                "model: give the tokenizer.json that the weights came with"
            )

    def ends(self) -> tuple[int, ...]:
        """Ids that end a text: the end token, and the usual ends of a turn that the tokenizer has."""
        names = [(self.special or {}).get("eos_token", ""), *_TURN_ENDS]
        found = [self.coder.token_to_id(name) for name in names if name]
        return tuple(sorted({i for i in found if i is not None}))

    def ids(self, text: str, *, special: bool = False) -> np.ndarray:
        """Text -> ids [n] int64. `special`: add what the tokenizer puts around a text."""
        return np.array(self.coder.encode(text, add_special_tokens=special).ids, np.int64)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.coder.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages (`role`, `content`) -> the prompt that the model was trained on. Raises InputError."""
        if not self.template:
            raise InputError("the tokenizer has no chat template; give a plain prompt instead")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        facts = {"messages": list(messages), "add_generation_prompt": True, **(self.special or {})}
        try:
            return environment.from_string(self.template).render(**facts)
        except TemplateError as error:
            raise InputError(f"the chat template refused the messages: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); is the download complete?") from error
    return found if isinstance(found, dict) else {}


def _special(facts: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = facts.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found
