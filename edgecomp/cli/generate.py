"""`edgecomp generate`: text from a decoder on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.table import Table

from edgecomp import progress
from edgecomp.cli.common import artifact_argument, json_option, show


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
    json_path: str | None,
) -> None:
    """Write the text that follows PROMPT, as it is made; ARTIFACT is of `edgecomp export-decoder`.

    Tokens per second and the reason for the end go to stderr. With --measure no PROMPT is needed: tokens per
    second of prefill and decode, and peak memory, are measured on this machine for each --context.
    """
    from edgecomp.language.generation import GenerationSession
    from edgecomp.language.sampling import Sampling

    if measure:
        show(measured(artifact, contexts, threads), json_path, speeds)
        return
    if prompt is None:
        raise click.UsageError("No PROMPT: give the text to go on from, or --measure")
    settings = Sampling(temperature, top_k, top_p, seed, max_tokens, stop)
    session = GenerationSession.open(artifact, threads=threads)
    pieces = (
        session.chat([{"role": "user", "content": prompt}], settings)
        if chat
        else session.stream(prompt, settings)
    )
    if json_path is None:
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
        progress.note(summary(facts(session)))
        return
    text = "".join(pieces)
    show({"text": text, **facts(session)}, json_path, lambda result: result["text"])


def measured(artifact: Path, contexts: Sequence[int], threads: int) -> dict[str, Any]:
    """What `--measure` says: the artifact, its cache, and an entry for each context."""
    from edgecomp.decoding_speed import CONTEXTS
    from edgecomp.decoding_speed import measure as by_context
    from edgecomp.language.generation import GenerationSession

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
        "context", "first token s", "prefill tokens/s", "decode ms", "tokens/s", "peak memory", "",
        box=None, pad_edge=False,
    )  # fmt: skip
    for row in result["contexts"]:
        numbers = [
            row[k] for k in ("first_token_s", "prefill_tokens_per_s", "decode_ms", "decode_tokens_per_s")
        ]
        peak = row["peak_rss_bytes"]
        table.add_row(
            str(row["context"]),
            *("" if n is None else format(n, ".2f") for n in numbers),
            "" if peak is None else format(peak, ","),
            row["reason"],
        )
    return table


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
    rate = found["decode_tokens_per_s"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    return (
        f"{found['new_tokens']} tokens after {found['prompt_tokens']} ({found['ended']}); "
        f"first after {found['first_token_s']:.2f} s{speed}"
    )
