"""Runs in the old environment: one artifact on inputs given, outputs written. Imports nothing of ours.

python run_old.py FILE INPUTS.npz OUTPUTS.npz
"""

import sys

import numpy as np


def tflite(path, arrays):
    from tflite_runtime.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    for details, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.set_tensor(details["index"], array)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]


def onnx(path, arrays):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)})


file, given, wanted = sys.argv[1:]
with np.load(given) as stored:
    inputs = [stored[f"x{i}"] for i in range(len(stored))]
outputs = (tflite if file.endswith(".tflite") else onnx)(file, inputs)
np.savez(wanted, **{f"y{i}": np.asarray(y) for i, y in enumerate(outputs)})
