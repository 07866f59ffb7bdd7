"""What LiteRT's benchmark_model prints, in the forms that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecomp.devices import benchmark_model, profiler
from edgecomp.devices.faults import OutputFormError
from edgecomp.devices.host import Request

FORMS = Path(__file__).with_name("forms")
NEWEST = (FORMS / "benchmark_model_newest.txt").read_text()
NO_PREFIX = (FORMS / "benchmark_model_no_prefix.txt").read_text()
OLDEST = (FORMS / "benchmark_model_oldest.txt").read_text()


def test_the_newest_form() -> None:
    found = benchmark_model.figures(NEWEST, before={}, after={})
    assert found.summary == {"min": 11.99, "max": 14.02, "mean": 12.515, "p50": 12.48, "p95": 13.3}
    assert (found.init_ms, found.first_ms) == (15.21, 19.0)
    assert (found.load_rss_bytes, found.peak_rss_bytes) == (9961472, 14942208)
    assert found.runtime["accelerator"] == "TfLiteXNNPackDelegate"
    assert found.ops == [
        {
            "name": "Delegate/Convolution (NHWC, QC8) IGEMM",
            "type": "Convolution (NHWC, QC8) IGEMM",
            "ms": 1.2,
            "placed_on": "TfLiteXNNPackDelegate",
        },
        {"name": "sum", "type": "CUMSUM", "ms": 0.012, "placed_on": "cpu"},
        {
            "name": "StatefulPartitionedCall:0",
            "type": "TfLiteXNNPackDelegate",
            "ms": 3.1,
            "placed_on": "TfLiteXNNPackDelegate",
        },
    ]
    assert "delegate TfLiteXNNPackDelegate took 62 of 66 nodes" in found.notes


def test_the_form_without_prefix_and_median() -> None:
    found = benchmark_model.figures(NO_PREFIX, before={}, after={})
    assert found.summary == {"min": 1199.0, "max": 1402.0, "mean": 1240.27}
    assert found.first_ms == 1900.0 and found.peak_rss_bytes == 8912896 and found.ops is None


def test_the_oldest_form() -> None:
    found = benchmark_model.figures(OLDEST, before={}, after={})
    assert found.summary is not None and found.summary["mean"] == 9.7132
    assert (found.init_ms, found.first_ms) == (2.2, None)
    assert found.ops is not None
    assert [(op["type"], op["name"], op["ms"]) for op in found.ops] == [
        ("CONV_2D", "conv/Relu6", 4.27),
        ("DEPTHWISE_CONV_2D", "dw", 2.15),
    ]


def test_only_an_average_is_still_a_mean() -> None:
    text = "Inference timings in us: Init: 1, First inference: 2, Warmup (avg): 3, Inference (avg): 4000"
    assert benchmark_model.figures(text, before={}, after={}).summary == {"mean": 4.0}


def test_unknown_output_is_kept() -> None:
    with pytest.raises(OutputFormError, match="Segmentation"):
        benchmark_model.figures("Segmentation fault", before={}, after={})


def test_a_tool_s_statistics_give_no_interval_and_no_verdict() -> None:
    spread = profiler.summarized({"min": 1.0, "p50": 2.0})
    assert spread is not None
    assert (
        spread["p50"] == 2.0
        and spread["samples"] is None
        and spread["ci95"] is None
        and spread["p99"] is None
    )
    assert profiler.throughput(spread) == 500.0
    assert profiler.throughput({"p50": None, "mean": 4.0}) == 250.0
    assert profiler.verdict((), spread) is None


def test_arguments(tmp_path: Path) -> None:
    words = benchmark_model.arguments("/m.tflite", Request(tmp_path, threads=4, accelerator="gpu"))
    assert {"--graph=/m.tflite", "--num_threads=4", "--use_gpu=true", "--num_runs=50"} <= set(words)
    delegate = benchmark_model.arguments("/m", Request(tmp_path, accelerator="/d/libnpu.so"))
    assert "--external_delegate_path=/d/libnpu.so" in delegate
