"""INT8 of ten models (see zoo.py): ours beside ONNX Runtime's, NNCF's and LiteRT's own quantizers, on the
same data.

    python benchmarks/int8_zoo.py [--model NAME ...] [--samples 200] [--calibration 128]
                                  [--nncf PYTHON] [--aimet PYTHON] [--budget] [--json PATH]

For each model every quantizer works once, in a process of its own, from the same calibration samples:
ours with its default settings (one plan, both files; `zoo.MEMBERS` says what is asked for besides), ONNX
Runtime's `quantize_static` (U8S8, per channel, min-max, after its pre-processing), NNCF (default, mixed and
transformer presets; `--nncf` names the Python of an environment with `nncf` and `onnx`), AIMET (min-max and
SQNR ranges; `--aimet` names one with `aimet-onnx`), LiteRT's `static_wi8_ai8` recipe with its own calibration
on litert-torch's conversion. Files are evaluated against the float torch model on other samples: SQNR over
all outputs together, share of equal top-1 (models that classify) and mean cosine. ONNX files run with graph
optimizations off, the arithmetic of Arm, ours in an optimized session as well; TFLite files in LiteRT with
XNNPACK.

The second table is the noise floor. Our TFLite file runs with XNNPACK and with LiteRT's reference
kernels, our ONNX file with optimizations off, and the fake-quantized torch graph beside them: share of
outputs within two steps of the output's scale, and the largest distance.

`--budget` adds a third: where a peer's file is ahead of ours, what `quantize-to-budget` makes of the peer's
result as a budget (zoo_budget.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
import zoo_budget

from edgecomp.numerics import metrics

Outputs = list[np.ndarray]
LIMIT_SECONDS = 1500


def samples_of(folder: Path, split: str) -> list[np.ndarray]:
    with np.load(folder / f"{split}.npz") as arrays:
        return [arrays[name] for name in arrays.files]


def keep(folder: Path, name: str, outputs: Outputs) -> None:
    np.savez(folder / f"{name}.npz", *outputs)


# --- tasks, each in a process of its own -----------------------------------------------------------


def prepare(member: zoo.Member, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The samples, the float model's answers to them, and the float ONNX file that the peers start from."""
    for split, count in (("calibration", options.calibration), ("evaluation", options.samples)):
        np.savez(
            folder / f"{split}.npz", **{f"inputs_{i}": a for i, a in enumerate(member.data(split, count))}
        )
    model, inputs = member.build(), samples_of(folder, "evaluation")
    parts = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), 10):
            found = model(*[torch.from_numpy(a[start : start + 10]) for a in inputs])
            parts.append([t.numpy() for t in (found if isinstance(found, tuple) else (found,))])
    keep(folder, "float", [np.concatenate(column) for column in zip(*parts, strict=True)])
    one = tuple(torch.from_numpy(a[:1]) for a in inputs)
    program = torch.onnx.export(
        model, one, dynamo=True, input_names=[f"inputs_{i}" for i in range(len(one))], opset_version=20,
        external_data=False, verbose=False,
    )  # fmt: skip
    program.save(str(folder / "float.onnx"))
    return {"parameters": sum(p.numel() for p in model.parameters())}


def edgecomp(member: zoo.Member, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Our default settings: one plan, both files, and the fake-quantized graph's own answers."""
    from edgecomp import registry
    from edgecomp.calibration_data.arrays import Arrays
    from edgecomp.spec import Candidate, Data, TensorSpec

    inputs = [a[:1] for a in samples_of(folder, "evaluation")]
    specs = tuple(
        TensorSpec(f"inputs_{i}", a.shape, str(a.dtype), "NCHW" if a.ndim == 4 else "")
        for i, a in enumerate(inputs)
    )
    data = Data(calibration=Arrays(str(folder / "calibration.npz")))
    start = time.perf_counter()
    candidate = registry.load("steps", "quantize")(**member.settings)(Candidate(member.build(), specs), data)
    quantized = time.perf_counter() - start
    activations = candidate.quantization.activations.values()
    wide = sum(q.spec.bits == 16 for q in activations)
    failed = {}
    for target, suffix in (("tflite-int8", ".tflite"), ("onnx-qdq", ".onnx")):
        try:
            registry.load("exporters", target)(target=target).export(
                candidate, data, folder / f"ours{suffix}"
            )
        except Exception as problem:  # the table shows it, other models go on
            failed[target] = str(problem)[:300]
    seconds = time.perf_counter() - start
    simulate(candidate, folder)
    return {
        "seconds": seconds, "quantize_seconds": quantized, "failed": failed,
        "settings": dict(member.settings), "values": len(activations), "values_of_16_bits": wide,
    }  # fmt: skip


def simulate(candidate: Any, folder: Path) -> None:
    from edgecomp.graph.fake_quant import fake_quantize

    graph = fake_quantize(candidate.module, candidate.quantization)
    inputs, parts = samples_of(folder, "evaluation"), []
    with torch.no_grad():
        for index in range(len(inputs[0])):
            found = graph(*[torch.from_numpy(a[index : index + 1]) for a in inputs])
            parts.append([t.numpy() for t in (found if isinstance(found, list | tuple) else (found,))])
    keep(folder, "simulated", [np.concatenate(column) for column in zip(*parts, strict=True)])


def onnxruntime(member: zoo.Member, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    arrays = samples_of(folder, "calibration")

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            rows = range(len(arrays[0]))
            self.rows = iter([{f"inputs_{k}": a[i : i + 1] for k, a in enumerate(arrays)} for i in rows])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    start = time.perf_counter()
    quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"), skip_symbolic_shape=False)
    q.quantize_static(
        str(folder / "prepared.onnx"), str(folder / "onnxruntime.onnx"), Reader(),
        quant_format=q.QuantFormat.QDQ, per_channel=True, activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8, calibrate_method=q.CalibrationMethod.MinMax,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - start}


def litert(member: zoo.Member, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import litert_torch
    from litert_quantizer import quantizer, recipe

    inputs = samples_of(folder, "calibration")
    start = time.perf_counter()
    narrow = [a.astype(np.int32) if a.dtype == np.int64 else a for a in inputs]  # as its converter does
    floats = litert_torch.convert(member.build(), tuple(torch.from_numpy(a[:1]) for a in inputs))
    floats.export(str(folder / "float.tflite"))
    rows = [{f"args_{k}": a[i : i + 1] for k, a in enumerate(narrow)} for i in range(len(inputs[0]))]
    own = quantizer.Quantizer(str(folder / "float.tflite"), recipe.static_wi8_ai8())
    ranges = own.calibrate({"serving_default": rows}, num_threads=1)
    own.quantize(ranges).export_model(str(folder / "litert.tflite"), overwrite=True)
    return {"seconds": time.perf_counter() - start}


def evaluate(member: zoo.Member, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every file that is there, against the float model; then the noise floor of our own."""
    expected = samples_of(folder, "float")
    inputs = samples_of(folder, "evaluation")
    found = {}
    for path in sorted(folder.glob("*.onnx")) + sorted(folder.glob("*.tflite")):
        if path.stem in ("float", "prepared"):
            continue
        try:
            outputs = run(path, inputs, deploy=True)
        except Exception as problem:  # a peer's file that no runtime takes is a result too
            found[path.name] = {"error": str(problem)[:300]}
            continue
        keep(folder, path.name, outputs)
        found[path.name] = scores(expected, arranged(expected, outputs), member.classes)
        found[path.name]["bytes"] = path.stat().st_size
    ours = folder / "ours.onnx"
    if "sqnr_db" in found.get(ours.name, {}):
        outputs = _run_onnx(ours, inputs, deploy=False)
        found["ours.onnx, optimized session"] = {
            **scores(expected, outputs, member.classes), "bytes": ours.stat().st_size
        }  # fmt: skip
    return {"files": found, "floor": floor(folder, inputs)}


def arranged(expected: Outputs, outputs: Outputs) -> Outputs:
    """TFLite files may hold their outputs in another order, channels last: shapes tell."""
    left = [o.transpose(0, 3, 1, 2) if o.ndim == 4 and o.shape[1] == o.shape[2] else o for o in outputs]
    return [left.pop(next(i for i, o in enumerate(left) if o.shape == e.shape)) for e in expected]


def scores(expected: Outputs, outputs: Outputs, classes: bool) -> dict[str, float]:
    flat = [np.concatenate([o.reshape(len(o), -1) for o in side], 1) for side in (expected, outputs)]
    result = {"sqnr_db": metrics.sqnr_db(*flat), "cosine": metrics.cosine(*flat)}
    if classes:
        result["top1_agreement"] = metrics.top1_agreement(expected[0], outputs[0])
    return result


def run(path: Path, inputs: list[np.ndarray], *, deploy: bool) -> Outputs:
    return (_run_onnx if path.suffix == ".onnx" else _run_tflite)(path, inputs, deploy)


def _run_onnx(path: Path, inputs: list[np.ndarray], deploy: bool) -> Outputs:
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL if deploy else level.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    if not deploy:  # ONNX Runtime 1.31 fails on files of 8 and 16 bits without it (docs/targets.md)
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    rows = [
        session.run(None, dict(zip(names, [a[i : i + 1] for a in inputs], strict=True)))
        for i in range(len(inputs[0]))
    ]
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def _run_tflite(path: Path, inputs: list[np.ndarray], deploy: bool) -> Outputs:
    from ai_edge_litert import interpreter as lite

    kind = lite.OpResolverType
    resolver = kind.AUTO if deploy else kind.BUILTIN_REF
    session = lite.Interpreter(str(path), experimental_op_resolver_type=resolver, num_threads=1)
    session.allocate_tensors()
    doors = (
        sorted(session.get_input_details(), key=lambda d: d["name"])
        if path.stem == "litert"
        else session.get_input_details()
    )
    exits, rows = session.get_output_details(), []
    for index in range(len(inputs[0])):
        for door, array in zip(doors, inputs, strict=True):
            session.set_tensor(door["index"], _stored(array[index : index + 1], door))
        session.invoke()
        rows.append([_restored(session.get_tensor(e["index"]), e) for e in exits])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def _stored(array: np.ndarray, door: dict[str, Any]) -> np.ndarray:
    if tuple(door["shape"]) != array.shape:
        array = array.transpose(0, 2, 3, 1)
    scale, zero = door["quantization"]
    if not scale:
        return array.astype(door["dtype"])
    limits = np.iinfo(door["dtype"])
    return np.clip(np.rint(array / np.float32(scale)) + zero, limits.min, limits.max).astype(door["dtype"])


def _restored(array: np.ndarray, door: dict[str, Any]) -> np.ndarray:
    scale, zero = door["quantization"]
    return (array.astype(np.float32) - zero) * np.float32(scale) if scale else array.astype(np.float32)


def floor(folder: Path, inputs: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Distances from XNNPACK in steps of the output's scale."""
    tflite = folder / "ours.tflite"
    if not tflite.exists() or not (folder / "ours.onnx.npz").exists():
        return {}
    expected, raw = samples_of(folder, "float"), samples_of(folder, "ours.tflite")
    deployed, scales = arranged(expected, raw), steps_of(tflite, expected)
    pairs = {
        "reference kernels": run(tflite, inputs, deploy=False),
        "fake-quantized torch": samples_of(folder, "simulated"),
        "ONNX, optimizations off": samples_of(folder, "ours.onnx"),
    }
    result = {}
    for name, other in pairs.items():
        gaps = [
            np.abs(a - b) / s for a, b, s in zip(deployed, arranged(expected, other), scales, strict=True)
        ]
        flat = np.rint(np.concatenate([g.ravel() for g in gaps]))
        result[name] = {
            "within_one": float((flat <= 1).mean()),
            "within_two": float((flat <= 2).mean()),
            "largest": float(flat.max()),
        }
    return result


def steps_of(path: Path, expected: Outputs) -> list[float]:
    """The scale of each output, in the float model's order (1 where an output is not quantized)."""
    from ai_edge_litert import interpreter as lite

    doors = lite.Interpreter(str(path)).get_output_details()
    marks = [np.full((len(expected[0]), *d["shape"][1:]), float(d["quantization"][0]) or 1.0) for d in doors]
    return [float(m.flat[0]) for m in arranged(expected, marks)]


def budget(member: zoo.Member, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return zoo_budget.quantize(member, folder, tuple(samples_of(folder, "calibration")))


# --- the run ---------------------------------------------------------------------------------------

TASKS: dict[str, Callable[[zoo.Member, Path, argparse.Namespace], dict[str, Any]]] = {
    "prepare": prepare, "edgecomp": edgecomp, "onnxruntime": onnxruntime, "litert": litert,
    "evaluate": evaluate, "budget": budget,
}  # fmt: skip


def in_own_process(task: str, name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run this file again for one task; its last line is JSON. A failure is returned under `error`."""
    command = [
        sys.executable, __file__, "--task", task, "--model", name, "--folder", str(folder),
        "--samples", str(options.samples), "--calibration", str(options.calibration),
    ]  # fmt: skip
    return finish(command, parse=True)


def finish(command: list[str], *, parse: bool) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {LIMIT_SECONDS} s"}
    if done.returncode:
        tail = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        return {"error": f"exit code {done.returncode}: {tail[0][:300] if tail else 'no message'}"}
    if parse:
        return json.loads(done.stdout.strip().splitlines()[-1])
    return {"seconds": time.perf_counter() - start}


def elsewhere(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """NNCF and AIMET, each by the Python of an environment of its own."""
    runs = [("nncf", options.nncf, way, "float") for way in ("default", "mixed", "transformer")]
    runs += [("aimet", options.aimet, way, "prepared") for way in ("min_max", "tf_enhanced")]
    result = {}
    for peer, python, way, source in runs:
        if python is not None:
            say(f"{folder.name}: {peer} {way}")
            script = str(Path(__file__).with_name(f"zoo_{peer}.py"))
            files = [str(folder / f) for f in (f"{source}.onnx", "calibration.npz", f"{peer}-{way}.onnx")]
            result[f"{peer}-{way}"] = finish([python, script, *files, way], parse=False)
    return result


def compare(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"model": name, "work": {}}
    for task in ("prepare", "edgecomp", "onnxruntime", "litert"):
        say(f"{name}: {task}")
        result["work"][task] = in_own_process(task, name, folder, options)
    result["work"] |= elsewhere(folder, options)
    say(f"{name}: evaluate")
    result |= in_own_process("evaluate", name, folder, options)
    return (
        result | within_budgets(name, folder, options, result.get("files", {})) if options.budget else result
    )


def within_budgets(
    name: str, folder: Path, options: argparse.Namespace, files: dict[str, Any]
) -> dict[str, Any]:
    """What a search with the best peer's result as budget gives; all files are evaluated again."""
    rows = zoo_budget.wanted(files)
    if not rows:
        return {}
    (folder / "budgets.json").write_text(json.dumps(rows))
    say(f"{name}: {len(rows)} budgets")
    found = in_own_process("budget", name, folder, options)
    if "error" in found:
        return {"budget_error": found["error"]}
    return found | {"files": in_own_process("evaluate", name, folder, options)["files"]}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | file | seconds | MB | SQNR dB | top-1 | cosine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        for file, f in r.get("files", {}).items():
            work = r["work"].get({"ours": "edgecomp"}.get(Path(file).stem, Path(file).stem), {})
            if "error" in f:
                lines.append(f"| {r['model']} | {file} | | | does not run: {f['error']} | | |")
                continue
            top1 = f"{f['top1_agreement']:.3f}" if "top1_agreement" in f else ""
            took = f"{work['seconds']:.1f}" if "seconds" in work else ""
            figures = f"{f['bytes'] / 1e6:.2f} | {f['sqnr_db']:.2f} | {top1} | {f['cosine']:.5f}"
            lines.append(f"| {r['model']} | {file} | {took} | {figures} |")
        for task, work in r["work"].items():
            for problem in [work["error"]] if "error" in work else work.get("failed", {}).values():
                lines.append(f"| {r['model']} | {task} | | | failed: {problem} | | |")
    lines += [
        "",
        "| model | XNNPACK beside | within one step | within two | largest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in results:
        for other, f in r.get("floor", {}).items():
            figures = f"{f['within_one']:.4f} | {f['within_two']:.4f} | {f['largest']:.0f}"
            lines.append(f"| {r['model']} | {other} | {figures} |")
    lines += ["", *zoo_budget.table(results)] if any("budgets" in r for r in results) else []
    lines += [f"{r['model']}: budgets failed: {r['budget_error']}" for r in results if "budget_error" in r]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=sorted(zoo.MEMBERS), help="only these")
    parser.add_argument("--samples", type=int, default=200, help="evaluation samples")
    parser.add_argument("--calibration", type=int, default=128, help="calibration samples")
    parser.add_argument("--nncf", metavar="PYTHON", help="Python of an environment with nncf and onnx")
    parser.add_argument("--aimet", metavar="PYTHON", help="Python of an environment with aimet-onnx")
    parser.add_argument("--budget", action="store_true", help="try the best peer's result as a budget")
    parser.add_argument("--json", metavar="PATH", help="write the figures there too (- is stdout)")
    parser.add_argument("--task", choices=sorted(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.manual_seed(0)
        print("\n" + json.dumps(TASKS[options.task](zoo.MEMBERS[options.model[0]], options.folder, options)))
        return
    results = []
    for name in options.model or list(zoo.MEMBERS):
        with tempfile.TemporaryDirectory() as place:
            (folder := Path(place) / name).mkdir()
            results.append(compare(name, folder, options))
        facts = json.dumps(results, indent=2)
        if options.json and options.json != "-":
            Path(options.json).write_text(facts + "\n")
    print(facts if options.json == "-" else table(results))


if __name__ == "__main__":
    main()
