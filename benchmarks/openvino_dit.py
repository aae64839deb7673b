"""A DiT as OpenVINO runs it on a CPU, in fp32 and in 8 bits by NNCF.

NNCF decides which layers get 8 bits and how: all products of weights, adaLN's and the embedders'
too; attention stays in fp32. Not among the requirements: pip install openvino nncf
"""

import copy
import logging
import warnings

import torch

from common.errors import InputError

FP32, INT8 = "OpenVINO, fp32", "OpenVINO, int8 by NNCF"


def check(args):
    """InputError where it is of no use, before any work."""
    if args.device.type != "cpu" or args.dtype != "fp32":
        raise InputError("--openvino: for a CPU, in fp32")
    packages()


def packages():
    """The two packages; InputError if they are missing."""
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise InputError(f"--openvino: {error}; pip install openvino nncf") from error
    nncf.set_log_level(logging.ERROR)
    return openvino, nncf


def twins(model, batch):
    """Label -> the model with a `forward` that OpenVINO computes, for batches shaped like this one:
    x (N, C, H, W), t (N,), y (N,) on a CPU. Scales are found on it: their values take no time."""
    openvino, nncf = packages()
    shapes = [tuple(part.shape) for part in batch]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: the shapes are fixed
        graph = openvino.convert_model(model, example_input=batch, input=shapes)
    dataset = nncf.Dataset([[part.numpy() for part in batch]])
    kind = nncf.ModelType.TRANSFORMER
    quantized = nncf.quantize(graph, dataset, model_type=kind, subset_size=1)
    graphs = {FP32: graph, INT8: quantized}
    return {label: served(model, openvino, graph) for label, graph in graphs.items()}


def served(model, openvino, graph):
    """A copy of the model that this graph computes, in fp32 and on torch's number of threads."""
    threads = torch.get_num_threads()
    settings = dict(INFERENCE_PRECISION_HINT="f32", INFERENCE_NUM_THREADS=threads)
    compiled, twin = openvino.compile_model(graph, "CPU", settings), copy.copy(model)

    def forward(x, t, y):
        return torch.from_numpy(compiled([x.numpy(), t.numpy(), y.numpy()])[0])

    twin.forward = forward
    return twin
