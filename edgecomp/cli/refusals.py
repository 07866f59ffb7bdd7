"""`edgecomp refusals`: does a compressed language model refuse and answer as the float one does?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp.cli.common import json_option, show
from edgecomp.cli.parity_show import gate_line
from edgecomp.errors import GateFailed, UnknownNameError
from edgecomp.parity import gates as gating

PATH = click.Path(path_type=Path)
_FIGURES = ("identical", "refusal", "safe", "samples", "unsafe")


@click.command("refusals")
@click.argument("reference", type=PATH)
@click.argument("artifact", type=PATH)
@click.option("--prompts", type=PATH, required=True, metavar="FILE", help='JSON lines: {"prompt", "unsafe"}.')
@click.option("--gate", "exprs", metavar="EXPR", multiple=True, help="A condition; repeatable.")
@click.option("--max-tokens", default=64, show_default=True, help="New tokens of an answer, at most.")
@click.option("--plain", is_flag=True, help="Prompts as they are, not in the model's chat template.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
@json_option
def command(
    reference: Path,
    artifact: Path,
    prompts: Path,
    exprs: tuple[str, ...],
    max_tokens: int,
    plain: bool,
    threads: int,
    json_path: str | None,
) -> None:
    """Compare which prompts two language models refuse; a gate that fails makes the exit code 1.

    REFERENCE and ARTIFACT are decoders of `edgecomp export-decoder`, or JSON lines of {"prompt", "answer"}. A
    gate is such as 'unsafe.agreement >= 0.98', 'unsafe.now_answered == 0' or 'safe.p_value >= 0.05'.
    """
    conditions = gating.parse_all(exprs)
    for gate in conditions:
        if gate.name.split(".")[0] not in _FIGURES:
            raise UnknownNameError("gate value", gate.name.split(".")[0], _FIGURES)
    from edgecomp import answers

    facts = answers.run(reference, artifact, prompts, max_tokens=max_tokens, chat=not plain, threads=threads)
    judged = [gate.check(facts) for gate in conditions]
    show({**facts, "gates": judged}, json_path, render)
    failed = [g for g in judged if not g["passed"]]
    if failed:
        raise GateFailed(f"{len(failed)} of {len(judged)} gates failed; the first: {failed[0]['reason']}")


def render(facts: Mapping[str, Any]) -> RenderableType:
    table = Table(
        "prompts", "", "refused before", "now", "agreement [95 %]", "now answered", "now refused", box=None
    )
    for name, title in (("refusal", "all"), ("unsafe", "unsafe"), ("safe", "safe")):
        group = facts[name]
        if group:
            low, high = group["ci95"]
            shares = f"{group['reference']:.1%}", f"{group['artifact']:.1%}"
            agreement = f"{group['agreement']:.1%} [{low:.1%}, {high:.1%}]"
            counts = str(group["now_answered"]), str(group["now_refused"])
            table.add_row(str(group["samples"]), title, *shares, agreement, *counts)
    lines = [Text(f"{facts['identical']:.1%} of the answers are the same, word for word")]
    lines += [Text(f"{c['refused']} alone refuses: {c['prompt'][:100]}") for c in facts["changed"][:5]]
    return Group(table, *lines, *[gate_line(facts["artifact"], g) for g in facts["gates"]])
