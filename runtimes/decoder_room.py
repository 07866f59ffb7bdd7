"""The room of a decoder's cache, the same in every runtime."""

from __future__ import annotations

from edgecomp.errors import InputError


def check_room(tokens: int, room: int) -> None:
    """Raises InputError when so many tokens in all do not fit the cache."""
    if tokens > room:
        raise InputError(
            f"{tokens} tokens do not fit a cache of {room}; shorten the prompt, "
            "or export the decoder with more --room"
        )
