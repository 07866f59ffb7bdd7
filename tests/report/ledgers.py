"""A ledger as a run leaves it, small enough to read."""

from __future__ import annotations

import math
import random
from typing import Any

LABELS = ["T-shirt/top", "Trouser", "Pullover"]


def profile(p50: float, seed: int, **changes: Any) -> dict[str, Any]:
    draw = random.Random(seed)
    samples = sorted(p50 * math.exp(draw.gauss(0, 0.04)) for _ in range(200))
    facts = {
        "device": {
            "name": "local",
            "kind": "local",
            "model": "AMD EPYC",
            "isa": "x86_64",
            "os": "Debian 12",
            "governor": None,
            "emulated": False,
        },
        "artifact": "model.tflite",
        "runtime": {"name": "ai-edge-litert", "version": "2.3.0", "accelerator": "cpu"},
        "init_ms": 3.2,
        "first_ms": p50 * 2,
        "latency_ms": {
            "samples": samples,
            "min": samples[0],
            "mean": sum(samples) / 200,
            "p50": samples[100],
            "p90": samples[180],
            "p95": samples[190],
            "p99": samples[198],
            "max": samples[-1],
            "ci95": [samples[90], samples[110]],
        },
        "throughput_per_s": 1000 / p50,
        "peak_rss_bytes": 48_300_000,
        "load_rss_bytes": 45_000_000,
        "model_bytes": 61_200,
        "ops": [
            {"name": "features.0", "type": "CONV_2D", "ms": 0.11, "placed_on": "XNNPACK"},
            {"name": "classifier", "type": "FULLY_CONNECTED", "ms": 0.02, "placed_on": "XNNPACK"},
        ],
        "thermal": {"throttled": None, "start_c": None, "end_c": None},
        "energy_mj": None,
        "instructions": None,
        "warnings": ["the governor is unknown: the clock may change during the run"],
    }
    return facts | changes


def artifact(target: str, size: int, accuracy: float, sqnr_db: float, profiles: list[Any]) -> dict[str, Any]:
    reference = 0.9042
    delta = accuracy - reference
    layers = [
        {
            "name": f"conv2d_{i}",
            "module": f"features.{i}.conv",
            "sqnr_db": 38 - 2.1 * i + (-9 if i == 5 else 0),
            "kind": "activations",
        }
        for i in range(8)
    ]
    gates = [
        {"expr": "top1_agreement >= 0.97", "value": 0.985, "passed": True, "reason": None},
        {
            "expr": "sqnr_db > 20",
            "value": sqnr_db,
            "passed": sqnr_db > 20,
            "reason": None if sqnr_db > 20 else f"sqnr_db is {sqnr_db}; the gate asks > 20",
        },
    ]
    suffix = {"tflite": ".tflite", "onnx": ".onnx", "coreml": ".mlpackage"}[target.split("-")[0]]
    return {
        "manifest": {
            "format": target.split("-")[0],
            "target": target,
            "size_bytes": size,
            "sha256": "ab" * 32,
            "labels": LABELS,
            "skipped": [],
        },
        "parity": {
            "path": f"build/demo/{target}{suffix}",
            "target": target,
            "runtime": "x",
            "samples": 2000,
            "top1_agreement": 0.985,
            "sqnr_db": sqnr_db,
            "cosine": 0.999,
            "max_abs_error": 0.31,
            "metric": {
                "name": "accuracy",
                "reference": reference,
                "artifact": accuracy,
                "delta": delta,
                "ci95": [delta - 0.003, delta + 0.003],
                "higher_is_better": True,
            },
            "flips": {"negative": 12, "positive": 9},
            "slices": [],
            "corruptions": [],
            "gates": gates,
            "passed": all(g["passed"] for g in gates),
            "layers": layers if target != "tflite-fp32" else [],
            "notes": [],
        },
        "profiles": profiles,
    }


def step(name: str, kind: str, accuracy: float, before: float, size: int, macs: int) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "settings": {"ratio": 0.5, "seed": 0} if kind == "prune" else {},
        "seconds": 21.5,
        "peak_rss_bytes": 812_000_000,
        "params": size // 4,
        "nonzero_params": size // 4,
        "macs": macs,
        "size_bytes": size,
        "metrics": {"accuracy": accuracy},
        "delta_vs_float": {"accuracy": accuracy - 0.9042},
        "delta_vs_previous": {"accuracy": accuracy - before},
        "passed": None if kind == "float" else True,
    }


def full() -> dict[str, Any]:
    """Four steps, four artifacts, one of which fails its gate and one of which was not profiled."""
    core = artifact(
        "coreml-pal4", 41_800, 0.8871, 14.2, [profile(0.4, 3, latency_ms=None, peak_rss_bytes=None)]
    )
    core["manifest"]["skipped"] = [
        {"op": "linear", "module": "head", "reason": "10 outputs do not divide by group 16"}
    ]
    return {
        "recipe": {"name": "Fashion-MNIST demo", "steps": [{"prune": {"ratio": 0.5}}, {"quantize": {}}]},
        "recipe_sha256": "0123456789abcdef" * 4,
        "environment": {
            "python": "3.11.7",
            "os": "Debian GNU/Linux 12",
            "cpu": "AMD EPYC",
            "versions": {"torch": "2.13.0", "onnx": "1.23.0"},
            "seed": 0,
        },
        "steps": [
            step("float", "float", 0.9042, 0.9042, 722_000, 12_300_000),
            step("prune", "prune", 0.8931, 0.9042, 301_000, 5_900_000),
            step("distil", "distill", 0.9029, 0.8931, 301_000, 5_900_000),
            step("quantize", "quantize", 0.9018, 0.9029, 76_000, 5_900_000),
        ],
        "artifacts": [
            artifact("tflite-int8", 88_400, 0.9018, 24.3, [profile(0.21, 1)]),
            artifact("onnx-qdq", 96_000, 0.9016, 24.1, [profile(0.16, 2)]),
            artifact("tflite-fp32", 305_000, 0.9029, 118.0, [profile(0.29, 4)]),
            core,
        ],
        "verdict": None,
    }
