#!/usr/bin/env python3
"""Runs one model on the machine it stands on and reports as JSON lines on stdout.

One file to copy to a board: Python 3.9 or newer, NumPy and one runtime (ai_edge_litert, tflite_runtime,
tensorflow or onnxruntime; coremltools on a Mac). It imports nothing of edgecomp and can be used by hand:

    python3 agent.py profile model.tflite --threads 4
    python3 agent.py infer model.onnx --inputs in.npz --outputs out.npz
    python3 agent.py decode decoder.onnx --request request.json
    python3 agent.py state

Each line is an object with `event`: start, runtime, init, first, warmup, samples, memory, ops, curve, mark,
after, done, or error (`kind`: runtime-missing, model, inputs, usage). Times are milliseconds of a monotonic
clock, memory is bytes, temperatures are degrees Celsius. Every timed run includes reading the outputs;
writing the inputs is not timed. Everything else that is printed goes to stderr.

`decode` runs a causal decoder with its key-value cache. The request holds `room` and `chunk` of the cache and
either `prompt` (token ids), `ends`, `max_tokens`, `temperature`, `top_k`, `top_p`, `seed`: then there is an
event `token` for each new one, and `ended`; or `contexts`, `new`, `vocabulary`: then `reading`, `writing` and
`context` for each length. It is removed once it is read. SIGTERM ends the text after the token at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import glob
import importlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

VERSION = 1
MARK = 0x45434D50  # prctl option that no kernel knows: the counting plugin of tests/lab looks for it
TFLITE_RUNTIMES = ("ai_edge_litert", "tflite_runtime", "tensorflow")
# ONNX Runtime 1.31 says this of files that mix 8 and 16 bits, where its optimizer makes a zero point unsigned
# and forgets the type beside it; with int8 left signed they open.
SIGNED = "output_dtype INT8 does not match y_zero_point type UINT8"
Emit = Callable[..., None]
Door = tuple[str, list[int], Any]  # name, shape, dtype of an input
Op = dict[str, Any]
DISTRIBUTIONS = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}


class Refused(Exception):
    """Work that cannot be done here; `kind` tells the host which branch of its errors it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---- what the machine says -------------------------------------------------------------------------------


def read(path: str) -> str | None:
    """Text of a small file, or None when it is not there or not ours to read."""
    try:
        with open(path, errors="replace") as stream:
            return stream.read().strip("\0\n ")
    except OSError:
        return None


def number(path: str) -> int | None:
    text = read(path)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def by_name(pattern: str, part: int = -2) -> dict[str, int]:
    """`/sys/.../cpu0/x` -> {"cpu0": number} for every file that matches."""
    found = {path.split("/")[part]: number(path) for path in sorted(glob.glob(pattern))}
    return {name: value for name, value in found.items() if value is not None}


def zones(folder: str, value: str) -> list[tuple[str, int]]:
    """Readings of thermal zones or cooling devices by their type: [[type, number], ...]."""
    found = []
    for name in sorted(glob.glob(f"/sys/class/thermal/{folder}*")):
        reading = number(name + "/" + value)
        if reading is not None:
            found.append((read(name + "/type") or os.path.basename(name), reading))
    return found


def tool(*argv: str) -> str | None:
    """First line of a tool's output, or None when the tool is not there, fails or hangs."""
    if shutil.which(argv[0]) is None:
        return None
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0]


def state() -> dict[str, Any]:
    """Governor, frequencies, caps, temperatures, throttling, load and swap, as the system reports them."""
    cpu = "/sys/devices/system/cpu/cpu*/"
    governors = {path.split("/")[-3]: read(path) for path in glob.glob(cpu + "cpufreq/scaling_governor")}
    swapped = dict(line.split() for line in (read("/proc/vmstat") or "").splitlines() if "swp" in line)
    return {
        "governors": governors,
        "khz": by_name(cpu + "cpufreq/scaling_cur_freq", -3),
        "cap_khz": by_name(cpu + "cpufreq/scaling_max_freq", -3),
        "max_khz": by_name(cpu + "cpufreq/cpuinfo_max_freq", -3),
        "throttle_counts": by_name(cpu + "thermal_throttle/core_throttle_count", -3),
        "temperatures": [[name, value / 1000.0] for name, value in zones("thermal_zone", "temp")],
        "cooling": zones("cooling_device", "cur_state"),
        "vcgencmd": tool("vcgencmd", "get_throttled"),
        "load": list(os.getloadavg()),
        "swap_in": int(swapped["pswpin"]) if "pswpin" in swapped else None,
    }


def memory() -> dict[str, int | None]:
    """Resident, peak, proportional and swapped bytes of this process."""
    found = dict.fromkeys(("rss", "peak", "pss", "swapped"))
    names = {"VmRSS:": "rss", "VmHWM:": "peak", "Pss:": "pss", "VmSwap:": "swapped"}
    for path in ("/proc/self/status", "/proc/self/smaps_rollup"):
        for line in (read(path) or "").splitlines():
            words = line.split()
            if words and words[0] in names:
                found[names[words[0]]] = int(words[1]) * 1024
    if found["peak"] is None and sys.platform == "darwin":
        import resource

        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


class OtherWork:
    """Processor time that others used between start and `cores()`, in cores (steal time counts)."""

    def __init__(self) -> None:
        self.start = self.now()

    @staticmethod
    def now() -> tuple[float, float, float] | None:
        fields = [int(word) for word in (read("/proc/stat") or "cpu").splitlines()[0].split()[1:9]]
        if len(fields) < 8:
            return None
        busy = sum(fields) - fields[3] - fields[4]
        return busy / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()

    def cores(self) -> float | None:
        end = self.now()
        if end is None or self.start is None or end[2] - self.start[2] < 0.2:
            return None
        others = (end[0] - self.start[0]) - (end[1] - self.start[1])
        return max(0.0, others / (end[2] - self.start[2]))


class Energy:
    """Joules from a counter of the kernel (powercap: Intel and AMD packages), or None."""

    def __init__(self) -> None:
        self.files = [p for p in glob.glob("/sys/class/powercap/*/energy_uj") if p.count(":") == 1]
        self.start = [number(p) for p in self.files]

    def joules(self) -> float | None:
        used = [b - a for a, b in zip(self.start, map(number, self.files)) if a is not None and b is not None]
        if not used or len(used) < len(self.files) or min(used) < 0:
            return None
        return sum(used) / 1e6


# ---- runtimes --------------------------------------------------------------------------------------------


def version_of(module: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(DISTRIBUTIONS.get(module, module))
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(module), "__version__", "unknown")


def import_first(names: Sequence[str], suffix: str) -> str:
    """The first of several modules that is there; one that is there but broken is an error."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise Refused("runtime-missing", f"{name} needs {error.name}") from error
            continue
        except ImportError as error:
            raise Refused("runtime-missing", f"{name} cannot be loaded: {error}") from error
        return name
    raise Refused("runtime-missing", f"a {suffix} file needs one of {', '.join(names)}, and none is here")


class LiteRT:
    """TensorFlow Lite's interpreter, under whichever of its three names is installed."""

    def __init__(self, options: argparse.Namespace) -> None:
        wanted = TFLITE_RUNTIMES if options.runtime == "auto" else (options.runtime,)
        self.name = import_first(wanted, ".tflite")
        inside = "tensorflow.lite" if self.name == "tensorflow" else self.name + ".interpreter"
        self.module = importlib.import_module(inside)
        self.version, self.options, self.accelerator = version_of(self.name), options, "xnnpack"

    def load(self, path: str) -> None:
        settings = {"model_path": path, "num_threads": self.options.threads}
        if self.options.accelerator == "none" or self.options.reference:
            self.accelerator = "none"
            resolvers = (
                getattr(self.module, "OpResolverType", None) or self.module.experimental.OpResolverType
            )
            settings["experimental_op_resolver_type"] = resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        elif self.options.accelerator not in ("auto", "cpu", "xnnpack"):
            self.accelerator = os.path.basename(self.options.accelerator)
            loader = getattr(self.module, "load_delegate", None) or self.module.experimental.load_delegate
            settings["experimental_delegates"] = [loader(self.options.accelerator)]
        self.interpreter = self.module.Interpreter(**settings)
        self.interpreter.allocate_tensors()
        self.doors = self.interpreter.get_input_details()
        self.results = [detail["index"] for detail in self.interpreter.get_output_details()]

    def inputs(self) -> list[Door]:
        return [(d["name"], [int(n) for n in d["shape"]], d["dtype"]) for d in self.doors]

    def outputs(self) -> list[str]:
        return [d["name"] for d in self.interpreter.get_output_details()]

    def feed(self, arrays: Sequence[Any]) -> None:
        for detail, array in zip(self.doors, arrays):
            self.interpreter.set_tensor(detail["index"], array)

    def step(self) -> list[Any]:
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(index) for index in self.results]

    def ops(self, _runs: int) -> list[Op] | None:
        """Operations and where they run; this interpreter tells no times to Python."""
        try:
            nodes = self.interpreter._get_ops_details()
        except AttributeError:
            return None
        groups = [node for node in nodes if node["op_name"] == "DELEGATE"]
        plain = [node for node in nodes if node["op_name"] != "DELEGATE"]
        inside = set().union(*[self._inside(group, plain) for group in groups]) if groups else set()
        place = self.accelerator if self.accelerator != "none" else "cpu"
        tensors = {t["index"]: t["name"] for t in self.interpreter.get_tensor_details()}
        rows = []
        for node in plain:
            first = int(node["outputs"][0]) if len(node["outputs"]) else -1
            on = place if node["index"] in inside else "cpu"
            rows.append(
                {"name": tensors.get(first, ""), "type": node["op_name"], "ms": None, "placed_on": on}
            )
        return rows

    @staticmethod
    def _inside(group: dict[str, Any], plain: list[dict[str, Any]]) -> set[int]:
        """Nodes that a delegate took: those behind its outputs, up to its inputs."""
        made_by = {int(t): node for node in plain for t in node["outputs"]}
        stop, todo, found = {int(t) for t in group["inputs"]}, [int(t) for t in group["outputs"]], set()
        while todo:
            node = made_by.get(todo.pop())
            if node is not None and node["index"] not in found:
                found.add(node["index"])
                todo.extend(int(t) for t in node["inputs"] if int(t) not in stop)
        return found


class OnnxRuntime:
    """onnxruntime; execution providers are asked for by their short name (cuda, tensorrt, coreml, ...)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name = import_first(("onnxruntime",), ".onnx")
        self.module = sys.modules["onnxruntime"]
        self.version, self.options = self.module.__version__, options
        self.module.set_default_logger_severity(3)

    def _providers(self) -> list[str]:
        wanted = "cpu" if self.options.accelerator == "auto" else self.options.accelerator
        known = {n.replace("ExecutionProvider", "").lower(): n for n in self.module.get_available_providers()}
        if wanted not in known:
            raise Refused(
                "runtime-missing",
                f"onnxruntime here has no provider {wanted!r}; it has {', '.join(known)}",
            )
        chain = [known[wanted]] + ([known["cuda"]] if wanted == "tensorrt" and "cuda" in known else [])
        return chain + [n for n in (known["cpu"],) if n not in chain]

    def _session(self, path: str, profile_prefix: str | None = None) -> Any:
        settings = self.module.SessionOptions()
        settings.intra_op_num_threads = self.options.threads
        settings.inter_op_num_threads = 1
        if self.options.reference:
            settings.graph_optimization_level = self.module.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self.options.marks:
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile_prefix:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile_prefix
        try:
            return self.module.InferenceSession(path, settings, providers=self._providers())
        except Exception as error:  # one class for everything that it refuses
            if SIGNED not in str(error):
                raise
        settings.add_session_config_entry("session.qdqisint8allowed", "1")
        return self.module.InferenceSession(path, settings, providers=self._providers())

    def load(self, path: str) -> None:
        self.path = path
        self.session = self._session(path)
        self.accelerator = self.session.get_providers()[0].replace("ExecutionProvider", "").lower()

    def inputs(self) -> list[Door]:
        types = {"float": "float32", "double": "float64", "tensor(bool)": "bool"}
        found = []
        for door in self.session.get_inputs():
            inner = door.type[len("tensor(") : -1]
            shape = [n if isinstance(n, int) and n > 0 else 1 for n in door.shape]
            found.append((door.name, shape, types.get(inner, inner)))
        return found

    def outputs(self) -> list[str]:
        return [o.name for o in self.session.get_outputs()]

    def feed(self, arrays: Sequence[Any]) -> None:
        self.fed = {door.name: array for door, array in zip(self.session.get_inputs(), arrays)}

    def step(self) -> list[Any]:
        return self.session.run(None, self.fed)

    def ops(self, runs: int) -> list[Op] | None:
        """Kernel times of each node: medians over `runs`, from a profiled session of its own."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(self.path, os.path.join(folder, "profile"))
            for _ in range(runs + 1):
                session.run(None, self.fed)
            with open(session.end_profiling()) as stream:
                events = json.load(stream)
        times: dict[str, list[float]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for event in events:
            if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
                continue
            name = event["name"][: -len("_kernel_time")]
            times.setdefault(name, []).append(event["dur"] / 1000.0)
            facts[name] = event.get("args", {})
        return [
            {
                "name": name,
                "type": facts[name].get("op_name", ""),
                "ms": statistics.median(taken[1:] or taken),
                "placed_on": facts[name].get("provider", "").replace("ExecutionProvider", "").lower(),
            }
            for name, taken in times.items()
        ]


class OnnxDecoder(OnnxRuntime):
    """Past and present keys and values in one buffer for each, appended to in place."""

    most = 256  # tokens at once: the logits of more would be large
    kinds = {"tensor(float)": "float32", "tensor(int8)": "int8", "tensor(uint8)": "uint8"}

    def prepare(self, room: int, _chunk: int) -> int:
        """Allocate the cache; returns its bytes."""
        import numpy as np

        doors = [d for d in self.session.get_inputs() if d.name.startswith("past_key_values.")]
        if not doors:
            raise Refused("model", f"{self.path} has no past_key_values: it is no decoder with a cache")
        arrays = {d.name: np.zeros((1, d.shape[1], room, d.shape[3]), self.kinds[d.type]) for d in doors}
        made = self.module.OrtValue.ortvalue_from_numpy
        self.cache = {name: made(array) for name, array in arrays.items()}
        self.position = 0
        return sum(array.nbytes for array in arrays.values())

    def decode(self, ids: Any) -> Any:
        """Logits [n, vocabulary] of the tokens that join the cache."""
        import numpy as np

        parts = [self._some(ids[i : i + self.most]) for i in range(0, len(ids), self.most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _some(self, ids: Any) -> Any:
        import numpy as np

        binding, total = self.session.io_binding(), self.position + len(ids)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_output("logits")
        for name, buffer in self.cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        self.session.run_with_iobinding(binding)
        self.position = total
        return binding.get_outputs()[0].numpy()[0]


def in_chunks(model: Any, ids: Any) -> Any:
    """Logits [n, vocabulary] of a decoder of fixed shape: whole chunks at once, the rest one by one."""
    import numpy as np

    parts, done = [], 0
    while done < len(ids):
        count = model.chunk if len(ids) - done >= model.chunk else 1
        name = "decode" if count == 1 and model.chunk != 1 else "prefill"
        parts.append(model.some(name, ids[done : done + count]))
        model.position += count
        done += count
    return np.concatenate(parts)


class LiteRTDecoder(LiteRT):
    """Signatures `prefill` and `decode`; new rows come out and are written into the cache here."""

    def load(self, path: str) -> None:
        self.interpreter = self.module.Interpreter(model_path=path, num_threads=self.options.threads)
        self.path = path

    def prepare(self, _room: int, chunk: int) -> int:
        """Allocate the cache; returns its bytes."""
        import numpy as np

        self.chunk, self.position = chunk, 0
        try:
            self.runners = {k: self.interpreter.get_signature_runner(k) for k in ("prefill", "decode")}
        except (ValueError, KeyError) as error:
            raise Refused("model", f"{self.path} is no decoder with a cache: {error}") from error
        details = self.runners["prefill"].get_input_details()
        self.types = {name: details[name]["dtype"] for name in ("ids", "position")}
        self.cache = {
            name: np.zeros(tuple(found["shape"]), found["dtype"])
            for name, found in details.items()
            if name.startswith(("key_", "value_"))
        }
        return sum(array.nbytes for array in self.cache.values())

    def decode(self, ids: Any) -> Any:
        return in_chunks(self, ids)

    def some(self, name: str, ids: Any) -> Any:
        import numpy as np

        position = np.array([self.position], self.types["position"])
        found = self.runners[name](
            ids=np.asarray(ids, self.types["ids"])[None], position=position, **self.cache
        )
        for key, array in self.cache.items():
            array[:, :, self.position : self.position + len(ids)] = found["new_" + key]
        return np.array(found["logits"])[0]


class CoreML:
    """Core ML through coremltools; predictions run on macOS only."""

    def __init__(self, options: argparse.Namespace) -> None:
        if sys.platform != "darwin":
            raise Refused(
                "runtime-missing", f"an .mlpackage runs on macOS and iOS only; this is {sys.platform}"
            )
        self.name = import_first(("coremltools",), ".mlpackage")
        self.module: Any = sys.modules["coremltools"]
        self.version, self.options = self.module.__version__, options
        self.accelerator: str = "all" if options.accelerator == "auto" else options.accelerator

    def _units(self) -> Any:
        units = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
        if self.accelerator not in units:
            raise Refused("usage", f"accelerator {self.accelerator!r}; Core ML has all, cpu, gpu, ane")
        return getattr(self.module.ComputeUnit, units[self.accelerator])

    def load(self, path: str) -> None:
        self.model = self.module.models.MLModel(path, compute_units=self._units())
        self.description = self.model.get_spec().description

    def inputs(self) -> list[Door]:
        types = {65568: "float32", 65600: "float64", 131104: "int32", 65552: "float16"}
        arrays = [(i.name, i.type.multiArrayType) for i in self.description.input]
        return [(name, [int(n) for n in a.shape], types.get(a.dataType, "float32")) for name, a in arrays]

    def outputs(self) -> list[str]:
        return [o.name for o in self.description.output]

    def feed(self, arrays: Sequence[Any]) -> None:
        self.fed = {door[0]: array for door, array in zip(self.inputs(), arrays)}

    def step(self) -> list[Any]:
        return list(self.model.predict(self.fed).values())

    def ops(self, _runs: int) -> list[Op] | None:
        return None


class CoreMLDecoder(CoreML):
    """Functions `prefill` and `decode` on one state, or on a cache of bytes that is kept here."""

    def load(self, path: str) -> None:
        described = self.module.utils.load_spec(path).description
        found = {f.name: f for f in described.functions} or {"prefill": described}
        units = self._units()
        self.models = {
            name: self.module.models.MLModel(path, compute_units=units, **self._named(name, found))
            for name in found
        }
        self.doors, self.ends = found["prefill"].input, [o.name for o in found["prefill"].output]
        self.state = self.models["prefill"].make_state() if found["prefill"].state else None

    @staticmethod
    def _named(name: str, found: dict[str, Any]) -> dict[str, str]:
        return {"function_name": name} if len(found) > 1 else {}

    def prepare(self, _room: int, chunk: int) -> int:
        """Allocate the cache; returns its bytes where it is kept here."""
        import numpy as np

        self.chunk, self.position = chunk, 0
        arrays = [
            (d.name, d.type.multiArrayType) for d in self.doors if d.name.startswith(("key_", "value_"))
        ]
        self.cache = {name: np.zeros([int(n) for n in a.shape], np.int8) for name, a in arrays}
        return sum(array.nbytes for array in self.cache.values())

    def decode(self, ids: Any) -> Any:
        return in_chunks(self, ids)

    def some(self, name: str, ids: Any) -> Any:
        import numpy as np

        given = {"ids": np.asarray(ids, np.int32)[None], "position": np.array([self.position], np.int32)}
        given.update(self.cache)
        found = self.models[name].predict(given, *([] if self.state is None else [self.state]))
        for array, key in zip(self.cache.values(), self.ends[1:]):
            array[:, :, self.position : self.position + len(ids)] = found[key]
        return np.asarray(found[self.ends[0]], np.float32)[0]


def open_model(options: argparse.Namespace, path: str) -> Any:
    decoders = {".tflite": LiteRTDecoder, ".onnx": OnnxDecoder, ".mlpackage": CoreMLDecoder}
    plain = {".tflite": LiteRT, ".onnx": OnnxRuntime, ".mlpackage": CoreML}
    kinds: dict[str, Any] = decoders if options.task == "decode" else plain
    suffix = os.path.splitext(path)[1]
    if suffix not in kinds:
        raise Refused("usage", f"{path} does not end in one of {', '.join(kinds)}")
    if not os.path.exists(path):
        raise Refused("model", f"no model at {path}")
    return kinds[suffix](options)


def loaded(model: Any, path: str) -> float:
    """Load a model; returns the milliseconds that it took."""
    start = time.perf_counter_ns()
    try:
        model.load(path)
    except Refused:
        raise
    except Exception as error:  # each runtime has errors of its own: all mean that it refused the model
        raise Refused("model", f"{model.name} cannot load {path}: {error}") from error
    return (time.perf_counter_ns() - start) / 1e6


# ---- inputs ----------------------------------------------------------------------------------------------


def arrays_for(doors: list[Door], path: str | None) -> list[Any]:
    """Arrays for each input: from an .npz (by name, else in order), or random with a fixed seed.

    Random: standard normal for floats, the whole range for 8 and 16 bits, 0 or 1 for wider integers (they
    may be indices) and booleans.
    """
    import numpy as np

    if path:
        return stored_arrays(doors, path)
    generator, made = np.random.default_rng(0), []
    for _name, shape, dtype in doors:
        kind = np.dtype(dtype)
        if kind.kind == "f":
            made.append(generator.standard_normal(shape).astype(kind))
        elif kind.itemsize <= 2 and kind.kind in "iu":
            limits: Any = np.iinfo(kind.name)
            made.append(generator.integers(limits.min, limits.max + 1, shape).astype(kind))
        else:
            made.append(generator.integers(0, 2, shape).astype(kind))
    return made


def stored_arrays(doors: list[Door], path: str) -> list[Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            held = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise Refused("inputs", f"cannot read {path}: {error}") from error
    names = [door[0] for door in doors]
    keys = names if all(name in held for name in names) else list(held)[: len(names)]
    if len(keys) < len(names):
        raise Refused("inputs", f"{path} holds {len(held)} arrays; the model has {len(names)} inputs")
    for (name, shape, dtype), key in zip(doors, keys):
        if list(held[key].shape[1:]) != list(shape[1:]) or held[key].dtype != np.dtype(dtype):
            raise Refused(
                "inputs",
                f"array {key!r} of {path} is {held[key].dtype} {held[key].shape}; "
                f"input {name!r} takes {np.dtype(dtype)} {tuple(shape)}",
            )
    return [np.ascontiguousarray(held[key]) for key in keys]


def slices(arrays: list[Any], doors: list[Door]) -> list[list[Any]]:
    """Cut stored arrays [N, ...] into pieces of the model's own batch."""
    size = doors[0][1][0] if doors and doors[0][1] else 1
    total = len(arrays[0]) if doors and doors[0][1] else 1
    if total % size:
        raise Refused("inputs", f"{total} samples do not divide by the model's batch of {size}")
    return [[a[i : i + size] for a in arrays] for i in range(0, total, size)]


# ---- measuring -------------------------------------------------------------------------------------------


def timed(model: Any) -> float:
    start = time.perf_counter_ns()
    model.step()
    return (time.perf_counter_ns() - start) / 1e6


def is_warm(samples: Sequence[float], window: int = 5, tolerance: float = 0.03) -> bool:
    """The medians of the last two windows differ by at most 3 %."""
    if len(samples) < 2 * window:
        return False
    before = statistics.median(samples[-2 * window : -window])
    return abs(statistics.median(samples[-window:]) - before) <= tolerance * before


def warm_up(models: list[Any], seconds: float) -> list[list[float]]:
    """Run in turn until each model's times are stable, or `seconds` are over."""
    taken: list[list[float]] = [[] for _ in models]
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(is_warm(t) for t in taken):
        for model, times in zip(models, taken):
            times.append(timed(model))
    return taken


def measure(models: list[Any], options: argparse.Namespace, emit: Emit) -> int:
    """Timed runs; two models take turns, and who goes first changes each time."""
    order = list(enumerate(models))
    waiting: list[list[float]] = [[] for _ in models]
    done = 0
    start = told = time.monotonic()
    while done < options.runs or time.monotonic() - start < options.seconds:
        for index, model in order:
            waiting[index].append(timed(model))
        order.reverse()
        done += 1
        if time.monotonic() - told > 1:
            waiting, told = tell(waiting, emit), time.monotonic()
    tell(waiting, emit)
    return done


def tell(waiting: list[list[float]], emit: Emit) -> list[list[float]]:
    for index, samples in enumerate(waiting):
        emit("samples", model=index, ms=samples)
    return [[] for _ in waiting]


def sustain(model: Any, options: argparse.Namespace, emit: Emit) -> None:
    """Run without a pause; at most 120 points of the curve, a median and the machine's state at each."""
    start = time.monotonic()
    slot = max(1.0, options.sustain / 120.0)
    while time.monotonic() - start < options.sustain:
        began, times = time.monotonic(), []
        while time.monotonic() - began < slot:
            times.append(timed(model))
        now = state()
        emit("curve", t_s=time.monotonic() - start, ms=statistics.median(times), runs=len(times), state=now)


def marked(model: Any, runs: int, emit: Emit) -> None:
    """Runs between two marks that an instruction-counting emulator sees.

    Before them: two runs that warm up, and two marks with nothing between, which tell what marking costs.
    """
    libc = ctypes.CDLL(None)

    def mark(tag: int) -> None:
        libc.prctl(ctypes.c_long(MARK), ctypes.c_ulong(tag), 0, 0, 0)

    model.step()
    model.step()
    gc.disable()
    mark(1)
    mark(2)
    for index in range(1, runs + 1):
        mark(2 * index + 1)
        model.step()
        mark(2 * index + 2)
    gc.enable()
    emit("mark", runs=runs)


def prepared(options: argparse.Namespace, path: str, emit: Emit, index: int) -> Any:
    model = open_model(options, path)
    emit("runtime", model=index, name=model.name, version=model.version)
    before = memory()
    init_ms = loaded(model, path)
    after = memory()
    doors = model.inputs()
    arrays = arrays_for(doors, options.inputs)
    model.feed([a[: d[1][0]] if d[1] else a for a, d in zip(arrays, doors)])
    emit("init", model=index, ms=init_ms, accelerator=model.accelerator, before=before, after=after)
    emit("first", model=index, ms=timed(model))
    return model


def profile(options: argparse.Namespace, emit: Emit) -> None:
    before = state()
    emit("start", version=VERSION, python=platform.python_version(), pid=os.getpid(), state=before)
    if options.pin:
        os.sched_setaffinity(0, options.pin)
    paths = [options.model] + ([options.against] if options.against else [])
    models = [prepared(options, path, emit, index) for index, path in enumerate(paths)]
    if options.marks:
        marked(models[0], options.marks, emit)
        return
    gc.disable()
    for index, times in enumerate(warm_up(models, options.warmup_seconds)):
        emit("warmup", model=index, ms=times, stable=is_warm(times))
    others, energy = OtherWork(), Energy()
    done = measure(models, options, emit)
    joules = energy.joules()
    emit(
        "after", state=state(), other_cores=others.cores(), joules=joules, runs=done, threads=options.threads
    )
    emit("memory", **memory())
    gc.enable()
    if options.sustain:
        sustain(models[0], options, emit)
    if options.op_runs and not options.against:
        emit("ops", ops=models[0].ops(options.op_runs))


def infer(options: argparse.Namespace, emit: Emit) -> None:
    """Outputs of every sample of an .npz, written as an .npz of output name -> array [N, ...]."""
    import numpy as np

    model = open_model(options, options.model)
    emit("runtime", model=0, name=model.name, version=model.version)
    loaded(model, options.model)
    doors = model.inputs()
    rows = []
    for piece in slices(arrays_for(doors, options.inputs), doors):
        model.feed(piece)
        rows.append([np.array(out) for out in model.step()])
    columns = [np.concatenate(column) for column in zip(*rows)]
    np.savez(options.outputs, **dict(zip(model.outputs(), columns)))
    emit("inferred", samples=len(rows))


# ---- decoding --------------------------------------------------------------------------------------------


class Stop:
    """Set by SIGTERM: the host has seen a stop string, or the time is over."""

    def __init__(self) -> None:
        self.wanted = False
        signal.signal(signal.SIGTERM, self._heard)

    def _heard(self, _number: int, _frame: Any) -> None:
        self.wanted = True


def probabilities(logits: Any, temperature: float, top_k: int, top_p: float) -> Any:
    """float64 [vocabulary]: softmax(logits / temperature), cut to top-k, then to top-p, summing to 1."""
    import numpy as np

    scaled = logits.astype(np.float64) / temperature
    if 0 < top_k < len(scaled):
        least = np.partition(scaled, -top_k)[-top_k]
        scaled = np.where(scaled >= least, scaled, -np.inf)
    odds = np.exp(scaled - scaled.max())
    odds /= odds.sum()
    if top_p < 1:
        order = np.argsort(-odds, kind="stable")
        before = np.cumsum(odds[order]) - odds[order]
        odds[order[before >= top_p]] = 0.0
        odds /= odds.sum()
    return odds


def next_token(logits: Any, request: dict[str, Any], generator: Any) -> int:
    import numpy as np

    if not np.all(logits < np.inf):
        raise Refused(
            "model", "the logits hold NaN or Inf: its weights or cache are damaged; export it again"
        )
    if request["temperature"] == 0:
        return int(logits.argmax())
    odds = probabilities(logits, request["temperature"], request["top_k"], request["top_p"])
    return int(generator.choice(len(odds), p=odds))


def read_prompt(model: Any, ids: Any, chunk: int) -> Any:
    """Put a prompt into the cache in pieces; the logits after its last token."""
    piece = max(256 // chunk, 1) * chunk if chunk else 256
    last = None
    for start in range(0, len(ids), piece):
        last = model.decode(ids[start : start + piece])[-1].copy()
    return last


def write_text(model: Any, request: dict[str, Any], emit: Emit) -> tuple[int, float | None]:
    """Tokens until an end, the last that is wanted, a full cache or SIGTERM; steps, and joules of them."""
    import numpy as np

    stop, generator = Stop(), np.random.default_rng(request["seed"])
    began, steps, reason = time.perf_counter_ns(), 0, "length"
    logits = read_prompt(model, np.array(request["prompt"], np.int64), request["chunk"])
    energy = Energy()
    for index in range(request["max_tokens"]):
        token = next_token(logits, request, generator)
        ms = (time.perf_counter_ns() - began) / 1e6
        if token in request["ends"]:
            reason = "end"
            emit("token", id=None, ms=ms)
            break
        emit("token", id=token, ms=ms)
        if stop.wanted or model.position >= request["room"]:
            reason = "stopped" if stop.wanted else "room"
            break
        if index + 1 < request["max_tokens"]:
            logits = model.decode(np.array([token]))[-1]
            steps += 1
    joules = energy.joules()
    emit("ended", reason=reason)
    return steps, joules


def fresh_peak() -> bool:
    """Let the high-water mark of memory begin anew; False where the system does not offer that."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


def by_context(model: Any, request: dict[str, Any], emit: Emit) -> None:
    """Read a prompt of each length, then write `new` tokens after it: milliseconds, joules, peak memory."""
    import numpy as np

    new = request["new"]
    ids = np.random.default_rng(0).integers(0, request["vocabulary"], max(request["contexts"]) + new)
    for context in request["contexts"]:
        model.position = 0
        model.decode(ids[:2])  # the first call allocates
        model.position, fresh = 0, fresh_peak()
        emit("reading", context=context)
        began = time.perf_counter_ns()
        read_prompt(model, ids[:context], request["chunk"])
        prefill_ms = (time.perf_counter_ns() - began) / 1e6
        emit("writing", context=context)
        energy, times = Energy(), []
        for token in ids[context : context + new]:
            began = time.perf_counter_ns()
            model.decode(np.array([token]))
            times.append((time.perf_counter_ns() - began) / 1e6)
        joules, peak = energy.joules(), memory()["peak"] if fresh else None
        emit("context", context=context, prefill_ms=prefill_ms, ms=times, joules=joules, peak=peak)


class OneStep:
    """One token after a prompt, again and again at the same place: what `marked` counts."""

    def __init__(self, model: Any, position: int) -> None:
        self.model, self.position = model, position

    def step(self) -> Any:
        import numpy as np

        self.model.position = self.position
        return self.model.decode(np.array([1]))


def decode(options: argparse.Namespace, emit: Emit) -> None:
    with open(options.request) as stream:
        request = json.load(stream)
    os.remove(options.request)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(options.request))
    before = state()
    emit("start", version=VERSION, python=platform.python_version(), pid=os.getpid(), state=before)
    model = open_model(options, options.model)
    emit("runtime", model=0, name=model.name, version=model.version)
    start = memory()
    init_ms = loaded(model, options.model)
    cache = model.prepare(request["room"], request["chunk"])
    place = getattr(model, "accelerator", "cpu")
    emit("init", model=0, ms=init_ms, accelerator=place, before=start, after=memory(), cache_bytes=cache)
    others, steps, joules = OtherWork(), 0, None
    if options.marks:
        context = request["contexts"][0]
        read_prompt(model, [1] * context, request["chunk"])
        marked(OneStep(model, context), options.marks, emit)
    elif "prompt" in request:
        steps, joules = write_text(model, request, emit)
    else:
        by_context(model, request, emit)
    cores = others.cores()
    emit("after", state=state(), other_cores=cores, joules=joules, runs=steps, threads=options.threads)
    emit("memory", **memory())


# ---- command line ----------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("profile", "infer", "decode", "state"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--against", help="a second model: the two take turns")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument(
        "--accelerator", default="auto", help="onnxruntime provider, delegate library, or none"
    )
    parser.add_argument("--reference", action="store_true", help="graph as written, no fused integer kernels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--warmup-seconds", type=float, default=5.0)
    parser.add_argument("--sustain", type=float, default=0.0, help="seconds of running without a pause")
    parser.add_argument("--op-runs", type=int, default=10, help="profiled runs; 0: no per-op times")
    parser.add_argument("--marks", type=int, default=0, help="runs between marks, nothing timed")
    parser.add_argument("--pin", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--inputs", help=".npz with the inputs; random when not given")
    parser.add_argument("--outputs", help=".npz to write (infer)")
    parser.add_argument("--request", help=".json of what to decode")
    options = parser.parse_args(argv)
    if options.task == "decode" and not options.request:
        parser.error("decode needs --request")
    if options.task != "state" and not options.model:
        parser.error(f"{options.task} needs a model")
    if options.task == "infer" and not (options.inputs and options.outputs):
        parser.error("infer needs --inputs and --outputs")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    out = os.fdopen(os.dup(1), "w")  # the protocol's own; whatever else is printed goes to stderr
    os.dup2(2, 1)

    def emit(event: str, **facts: Any) -> None:
        out.write(json.dumps({"event": event, **facts}) + "\n")
        out.flush()

    try:
        if options.task == "state":
            emit("state", state=state())
        else:
            {"profile": profile, "infer": infer, "decode": decode}[options.task](options, emit)
    except Refused as refusal:
        emit("error", kind=refusal.kind, message=str(refusal))
        return 3 if refusal.kind == "runtime-missing" else 2
    except OSError as error:
        emit("error", kind="machine", message=str(error))
        return 2
    emit("done")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
