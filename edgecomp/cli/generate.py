"""`edgecomp generate`: text from a decoder on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgecomp import progress
from edgecomp.cli.common import artifact_argument, json_option, show


@click.command("generate")
@artifact_argument
@click.argument("prompt")
@click.option("--max-tokens", default=128, show_default=True, help="New tokens at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-k", default=0, show_default=True, help="Draw from this many tokens (0: all).")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest that sum to this.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the text before this string; repeatable.")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message in the model's chat template.")
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime.")
@json_option
def command(
    artifact: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    chat: bool,
    threads: int,
    json_path: str | None,
) -> None:
    """Write the text that follows PROMPT, as it is made; ARTIFACT is of `edgecomp export-decoder`.

    Tokens per second and the reason for the end go to stderr.
    """
    from edgecomp.language.generation import GenerationSession
    from edgecomp.language.sampling import Sampling

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
