"""EfficientNet-Lite0 through the emulated Arm board: add, check, setup, profile, and integers compared.

    python benchmarks/lab_efficientnet.py DIR [--samples 4] [--json PATH]

DIR holds `tflite-int8.tflite` and `onnx-qdq.onnx`, as `edgecomp run examples/efficientnet_lite0.yaml
--out DIR` leaves them. Needs root on Debian (tests/lab/lab_build.py builds the board). Every step is a
command of the installed package in a process of its own; the board sees no runtime until `devices setup` has
sent one. Prints, as JSON, which keys of the profile are missing against docs/contract.md, the share of equal
outputs on each processor, and two instruction counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "lab"))
import lab_build as build  # noqa: E402
import lab_machine as machine  # noqa: E402

MODEL, DATA = "examples/efficientnet_lite0.py:build", "examples/efficientnet_lite0.py:evaluation"
CPUS = "cortex-a53 neoverse-n1 max max,sme=off"
# Keys of docs/contract.md: a profile, and the objects inside it that are never null.
PROFILE = {
    "device": ("name", "kind", "model", "isa", "os", "governor", "emulated"),
    "artifact": (),
    "runtime": ("name", "version", "accelerator"),
    "init_ms": (),
    "first_ms": (),
    "latency_ms": (),
    "throughput_per_s": (),
    "peak_rss_bytes": (),
    "load_rss_bytes": (),
    "model_bytes": (),
    "ops": (),
    "thermal": ("throttled", "start_c", "end_c"),
    "energy_mj": (),
    "instructions": (),
    "warnings": (),
}  # fmt: skip


def edgecomp(*words: str, json_out: bool = True) -> Any:
    """One command of the installed package; its JSON, or nothing. Ends the script when it fails."""
    argv = [sys.executable, "-m", "edgecomp", *words, *(["--json", "-"] if json_out else [])]
    start = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    print(f"{time.monotonic() - start:6.1f} s  edgecomp {' '.join(words)}", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout) if json_out else None


def missing_keys(profile: dict[str, Any]) -> list[str]:
    found = [key for key in PROFILE if key not in profile]
    for key, inner in PROFILE.items():
        found += [f"{key}.{name}" for name in inner if name not in (profile.get(key) or {})]
    return found


def add(board: machine.Board, book: list[str]) -> None:
    """The host key is refused first, and accepted by the fingerprint that the refusal tells."""
    # -S: the root's own packages are not seen, so that `setup` has work to do.
    where = ["--ssh", f"root@127.0.0.1:{board.port}", "--key", str(board.key), "--python", "python3 -S"]
    words = ["devices", "add", "lab", *where, "--set", f"cpus={CPUS}", *book, "--accept-host-key"]
    argv = [sys.executable, "-m", "edgecomp", *words, "SHA256:unknown"]
    refused = subprocess.run(argv, capture_output=True, text=True)
    fingerprint = "SHA256:" + refused.stderr.split("SHA256:")[1].split(";")[0].split()[0]
    edgecomp(*words, fingerprint, json_out=False)


def profiled(artifact: Path, book: list[str]) -> dict[str, Any]:
    profile = edgecomp("profile", str(artifact), "--device", "lab", *book)
    ops = profile["ops"] or []
    return {
        "runtime": profile["runtime"],
        "emulated": profile["device"]["emulated"],
        "missing_keys": missing_keys(profile),
        "ops": len(ops),
        "placed_on": sorted({op["placed_on"] for op in ops}),
        "warnings": profile["warnings"],
    }


def counted(artifact: Path, book: list[str]) -> dict[str, Any]:
    words = ["profile", str(artifact), "--device", "counter", "--instructions", "--timeout", "1800", *book]
    first, second = (edgecomp(*words)["instructions"] for _ in range(2))
    return {"instructions": [first, second], "difference": abs(first - second) / first}


def compared(artifacts: list[Path], samples: int, book: list[str]) -> list[dict[str, Any]]:
    names = [str(a) for a in artifacts]
    words = ["parity", MODEL, *names, "--data", DATA, "--limit", str(samples), "--device", "lab", *book]
    keys = ("device", "isa", "equal_share", "largest_step", "top1_flips", "reference_step", "saturates")
    return [
        {
            "artifact": entry["path"],
            "samples": entry["devices"]["samples"],
            "rows": [{k: row[k] for k in keys} for row in entry["devices"]["rows"]],
            "warnings": entry["devices"]["warnings"],
        }
        for entry in edgecomp(*words)["artifacts"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-counts", action="store_true", help="leave the instruction counts out")
    options = parser.parse_args()
    reason = build.why_not()
    if reason:
        raise SystemExit(reason)
    build.ensure()
    artifacts = [(options.folder / name).resolve() for name in ("tflite-int8.tflite", "onnx-qdq.onnx")]
    with tempfile.TemporaryDirectory() as folder:
        board = machine.Board(Path(folder) / "board", cpu="cortex-a53")
        board.start()
        book = ["--inventory", str(Path(folder) / "devices.toml")]
        try:
            add(board, book)
            before = edgecomp("devices", "check", "lab", *book)["devices"][0]
            runtimes = edgecomp("devices", "setup", "lab", "--wheels", str(build.WHEELS), *book)["runtimes"]
            facts: dict[str, Any] = {
                "lacked": [gap["what"] for gap in before["lacking"]],
                "installed": runtimes,
                "profiles": {a.name: profiled(a, book) for a in artifacts},
            }
            counter = [
                "--qemu",
                str(build.ROOT),
                "--set",
                f"plugin={build.PLUGIN}",
                "--set",
                "cpu=cortex-a53",
            ]
            edgecomp("devices", "add", "counter", *counter, *book, json_out=False)
            if not options.no_counts:
                facts["instructions"] = {a.name: counted(a, book) for a in artifacts}
            facts["processors"] = compared(artifacts, options.samples, book)
        finally:
            board.stop()
    text = json.dumps(facts, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
