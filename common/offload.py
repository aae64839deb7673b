"""One unit of the network on the device at a time, and chunks that arrive ahead of their use.

Units are the pieces that Phases 2 and 3 take one after the other: the embedder, every block, the
final layer. Everything inside a unit follows from its inputs and the gradient at its outputs.
"""

import ctypes
from contextlib import contextmanager

import torch


def units(model):
    """Unit's name -> prefix of its parameters' names, in the network's order."""
    return units_of(len(model.blocks))


def units_of(depth):
    """The same of a network with so many blocks."""
    blocks = {f"block_{i:02d}": f"blocks.{i}." for i in range(depth)}
    return {"embed": ""} | blocks | {"final": "final_layer."}


@contextmanager
def unit_on(model, name, device):
    """The unit as a function, on `device` meanwhile and on the host before and after.

    The embedder maps (x, t, y) to (tokens, c), every other unit (tokens, c) to (tokens,); once
    quantized it takes the time groups of the rows too.
    """
    prefix = units(model)[name]
    module = model.get_submodule(prefix.rstrip(".")) if prefix else None
    parts = [module] if prefix else [model.x_embedder, model.t_embedder, model.y_embedder]
    for part in parts:
        part.to(device)
    model.pos_embed.data = model.pos_embed.data.to(device)
    try:
        if prefix:
            yield lambda x, c, group=None: (module(x, c, group),)
        else:
            yield lambda x, t, y, group=None: model.embed(x, t, y)
    finally:
        model.pos_embed.data = model.pos_embed.data.cpu()
        for part in parts:
            part.cpu()


def in_batches(function, columns, batch_size, device):
    """function(*batch) over batches of the rows of these columns, each on the device for its own
    time; what it returns, a list of tensors, joined on the host."""
    batches = zip(*(column.split(batch_size) for column in columns), strict=True)
    results = ([x.cpu() for x in function(*(x.to(device) for x in batch))] for batch in batches)
    return [torch.cat(column) for column in zip(*results, strict=True)]


@torch.no_grad()
def next_inputs(model, name, inputs, batch_size, device, groups=None):
    """The inputs (tokens, c) of the unit that follows this one, on the host; of a quantized model
    given the time groups of the rows."""
    columns = inputs if groups is None else [*inputs, groups]
    with unit_on(model, name, device) as function:
        outputs = in_batches(function, columns, batch_size, device)
    return outputs if name == "embed" else [*outputs, inputs[1]]


def prefetch(chunks, device):
    """Chunks, named tuples of tensors, in turn on the device.

    On CUDA the next one is copied while one is worked on, into the other of two buffers: a chunk
    holds until the next is asked for.
    """
    if device.type != "cuda":
        yield from chunks
        return
    largest = max(chunks, key=lambda chunk: len(chunk[0]))
    buffers = [[torch.empty_like(x, device=device) for x in largest] for _ in range(2)]
    work, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def fetch(i):
        copies.wait_stream(work)  # chunk i - 2, which had this buffer, is done with
        here = [buffer[: len(x)] for buffer, x in zip(buffers[i % 2], chunks[i], strict=True)]
        with torch.cuda.stream(copies):
            for x, source in zip(here, chunks[i], strict=True):
                x.copy_(source, non_blocking=True)
        return type(chunks[i])(*here)

    following = fetch(0)
    for i in range(len(chunks)):
        here = following
        work.wait_stream(copies)
        following = fetch(i + 1) if i + 1 < len(chunks) else None
        yield here


def give_back_memory():
    """Return freed host memory to the system: glibc keeps what lies between blocks still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def pinned(x, device):
    """The same tensor on the host, from where CUDA copies without waiting."""
    return x.pin_memory() if device.type == "cuda" else x


@contextmanager
def offloaded(model, device):
    """On CUDA every unit comes to the device for its own forward pass and leaves it again."""
    own = [model.x_embedder, model.t_embedder, model.y_embedder, *model.blocks, model.final_layer]
    hosts, handles = {}, []

    def tensors(module):
        return [*module.parameters(), *module.buffers()]

    def arrive(module, _):
        hosts[module] = [tensor.data for tensor in tensors(module)]
        for tensor in tensors(module):
            tensor.data = tensor.data.to(device)

    def leave(module, *_):
        for tensor, host in zip(tensors(module), hosts.pop(module), strict=True):
            tensor.data = host

    if device.type == "cuda":
        handles = [part.register_forward_pre_hook(arrive) for part in own]
        handles += [part.register_forward_hook(leave) for part in own]
    rest = [x for x in (model.pos_embed, model.group_table) if x is not None]
    for tensor in rest:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor in rest:
            tensor.data = tensor.data.cpu()
