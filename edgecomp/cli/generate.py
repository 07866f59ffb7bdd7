"""`edgecomp generate`: text from a decoder, on this machine or on a device, and its speed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgecomp import progress, registry
from edgecomp.cli.common import artifact_argument, json_option, show
from edgecomp.errors import InputError

PATH = click.Path(path_type=Path)


@click.command("generate")
@artifact_argument
@click.argument("prompt", required=False)
@click.option("--max-tokens", default=128, show_default=True, help="New tokens at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-k", default=0, show_default=True, help="Draw from this many tokens (0: all).")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest that sum to this.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the text before this string; repeatable.")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message in the model's chat template.")
@click.option("--measure", is_flag=True, help="No text: speed and peak memory by context length.")
@click.option(
    "--context", "contexts", type=int, multiple=True, metavar="N",
    help="With --measure: tokens in the cache; repeatable (default: 512, 2048, 4096).",
)  # fmt: skip
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime.")
@click.option("--device", metavar="NAME", help="A device of the inventory, or local: a fresh process there.")
@click.option("--inventory", type=PATH, help="The inventory file (default: the user's).")
@click.option(
    "--instructions", is_flag=True, help="With --measure: count those of one token (emulated device)."
)
@click.option(
    "--timeout", default=600.0, show_default=True, help="Seconds that the work on a device may take."
)
@json_option
def command(
    artifact: Path,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    chat: bool,
    measure: bool,
    contexts: tuple[int, ...],
    threads: int,
    device: str | None,
    inventory: Path | None,
    instructions: bool,
    timeout: float,
    json_path: str | None,
) -> None:
    """Write the text that follows PROMPT, as it is made; ARTIFACT is of `edgecomp export-decoder`.

    Tokens per second and the reason for the end go to stderr. With --measure no PROMPT is needed: tokens per
    second of prefill and decode, and peak memory, are measured for each --context. With --device both happen
    there, from token ids: the text, its tokenizer and stop strings stay on this machine.
    """
    from edgecomp.language.sampling import Sampling

    if measure:
        with opened(device, inventory) as there:
            found = measured(artifact, contexts, threads, there, timeout, instructions)
        show(found, json_path, speeds)
        return
    if prompt is None:
        raise click.UsageError("No PROMPT: give the text to go on from, or --measure")
    if instructions:
        raise InputError("--instructions counts those of one token; give it with --measure")
    settings = Sampling(temperature, top_k, top_p, seed, max_tokens, stop)
    with opened(device, inventory) as there:
        if there is not None:
            found = said(there, artifact, prompt, settings, chat, threads, timeout, json_path is None)
        else:
            found = said_here(artifact, prompt, settings, chat, threads, json_path is None)
    if json_path is None:
        click.echo()
        progress.note(summary(found))
    else:
        show(found, json_path, lambda result: result["text"])


@contextlib.contextmanager
def opened(name: str | None, inventory: Path | None) -> Iterator[Any]:
    """The device of that name; None where none is named."""
    if name is None:
        yield None
        return
    book = registry.load("profiling", "inventory").read(inventory)
    device = book.open(name)
    try:
        yield device
    finally:
        device.close()


def said(
    device: Any,
    artifact: Path,
    prompt: str,
    settings: Any,
    chat: bool,
    threads: int,
    timeout: float,
    shown: bool,
) -> dict[str, Any]:
    """The text of a device, and what was measured of it; `shown`: written to stdout as it comes."""
    from edgecomp.decoding_on_device import generate

    return generate(
        device, artifact, prompt, settings, chat=chat, threads=threads, timeout_s=timeout,
        on_piece=written if shown else None,
    )  # fmt: skip


def written(piece: str) -> None:
    click.echo(piece, nl=False)


def said_here(
    artifact: Path, prompt: str, settings: Any, chat: bool, threads: int, shown: bool
) -> dict[str, Any]:
    """The same in this process."""
    from edgecomp.language.generation import GenerationSession

    session = GenerationSession.open(artifact, threads=threads)
    pieces = (
        session.chat([{"role": "user", "content": prompt}], settings)
        if chat
        else session.stream(prompt, settings)
    )
    text = ""
    for piece in pieces:
        text += piece
        if shown:
            written(piece)
    return {"text": text, **facts(session)}


def measured(
    artifact: Path,
    contexts: Sequence[int],
    threads: int,
    device: Any = None,
    timeout: float = 600.0,
    instructions: bool = False,
) -> dict[str, Any]:
    """What `--measure` says: the artifact, its cache, and an entry for each context; here or on a device."""
    from edgecomp.decoding_on_device import measure as on_device
    from edgecomp.decoding_speed import CONTEXTS
    from edgecomp.decoding_speed import measure as by_context
    from edgecomp.language.generation import GenerationSession

    if device is not None:
        return on_device(
            device, artifact, contexts or CONTEXTS, threads=threads, timeout_s=timeout,
            instructions=instructions,
        )  # fmt: skip
    if instructions:
        raise InputError("--instructions counts on an emulated device; name one with --device")
    if artifact.suffix == ".mlpackage":
        raise InputError(
            "the reference executor's time is no device's: measure a package on a Mac with --device NAME "
            "(`edgecomp devices add NAME --apple USER@HOST`)"
        )
    session = GenerationSession.open(artifact, threads=threads)
    facts = session.facts
    found = by_context(
        session.decoder, facts.architecture.vocabulary, contexts or CONTEXTS, chunk=facts.chunk
    )
    return {
        "artifact": str(artifact), "threads": threads, "room": session.facts.room,
        "cache": session.facts.storage, "cache_bytes": session.decoder.cache_bytes, "contexts": found,
    }  # fmt: skip


def speeds(result: Mapping[str, Any]) -> RenderableType:
    table = Table(
        "context", "first token s", "prefill tokens/s", "decode ms", "tokens/s", "mJ/token", "peak memory",
        "", box=None, pad_edge=False,
    )  # fmt: skip
    for row in result["contexts"]:
        numbers = [
            row[k]
            for k in (
                "first_token_s", "prefill_tokens_per_s", "decode_ms", "decode_tokens_per_s",
                "energy_per_token_mj",
            )
        ]  # fmt: skip
        told = [row["reason"]] if row["reason"] else []
        if row["instructions"] is not None:
            told.append(f"{row['instructions']:,} instructions a token")
        peak = row["peak_rss_bytes"]
        table.add_row(
            str(row["context"]),
            *("" if n is None else format(n, ".2f") for n in numbers),
            "" if peak is None else format(peak, ","),
            "; ".join(told),
        )
    return Group(table, *[Text(warning) for warning in result.get("warnings", ())])


def facts(session: Any) -> dict[str, Any]:
    """`ended`: end, stop, length or room; tokens, seconds and rates of the last generation."""
    timing = session.timing
    return {
        "ended": session.ended,
        "prompt_tokens": timing.prompt_tokens,
        "new_tokens": timing.new_tokens,
        "first_token_s": timing.first_s,
        "decode_tokens_per_s": timing.decode_tokens_per_s,
        "cache_bytes": session.decoder.cache_bytes,
    }


def summary(found: dict[str, Any]) -> str:
    first, rate = found["first_token_s"], found["decode_tokens_per_s"]
    energy = found.get("energy_per_token_mj")
    parts = [f"{found['new_tokens']} tokens after {found['prompt_tokens']} ({found['ended']})"]
    parts += [f"first after {first:.2f} s"] if first is not None else []
    parts += [f"{rate:.1f} tokens/s"] if rate is not None else []
    parts += [f"{energy:.1f} mJ a token"] if energy is not None else []
    return "; ".join([*parts, *found.get("warnings", ())])
