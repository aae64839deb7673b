"""Put an exported quant file into diffusers' DiTPipeline: `load_into(pipe, path)`.

The linear layers of its transformer are swapped, attention gets a processor with both products
quantized, and the two constants that differ from the official network are set to its own. How the
pipeline samples stays as it is; `AsDiT` lets `models_dit.trajectory` sample with its transformer.
"""

import torch
import torch.nn as nn

from common.checks import Fault, TensorOf, check, need, told
from common.diffusers_file import FLOAT, METADATA, check_about, layer_spec, make_layer
from common.diffusers_names import copies_of, layer_names
from common.errors import InputError, reading
from common.weight_files import load_safetensors, read_json
from models_dit import TRAIN_TIMESTEPS, DiT, MatMul
from quant_ops import QuantMatMul


class TimeGroup(nn.Module):
    """The time groups of the rows that the transformer is working on: it tells them when it is
    called, its layers, which are called without them, ask."""

    def __init__(self, first_timesteps):
        super().__init__()
        starts = torch.tensor(first_timesteps)
        table = (torch.arange(TRAIN_TIMESTEPS)[:, None] >= starts).sum(dim=1) - 1  # Eq. (9)
        self.register_buffer("table", table, persistent=False)
        self.now = None  # (N,)

    def listen(self, transformer, args, kwargs):
        """A forward pre-hook of the transformer."""
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        t = t.float().round().long().clamp(0, TRAIN_TIMESTEPS - 1)  # some schedulers ask between
        self.now = self.table[t]


class InGroup(nn.Module):
    """A quantized layer, called as diffusers calls it: with its input alone."""

    def __init__(self, layer, time_group):
        super().__init__()
        self.layer, self.time_group = layer, time_group

    def forward(self, x):
        return self.layer(x, self.time_group.now)


class QuantizedAttention(nn.Module):
    """An attention processor with both products explicit, as in models_dit.Attention."""

    def __init__(self, products, time_group):
        super().__init__()
        self.qk, self.av = products.get("qk", MatMul()), products.get("av", MatMul())
        self.time_group = time_group

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        projections = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projections)
        scores = self.qk(q * q.shape[-1] ** -0.5, k.transpose(-2, -1), self.time_group.now)
        out = self.av(scores.softmax(dim=-1), v, self.time_group.now)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class AsDiT(nn.Module):
    """A transformer of diffusers where a models_dit.DiT is wanted."""

    forward_with_cfg = DiT.forward_with_cfg

    def __init__(self, transformer):
        super().__init__()
        self.transformer, config = transformer, transformer.config
        self.in_channels, self.input_size = config.in_channels, config.sample_size
        self.num_classes = config.num_embeds_ada_norm

    def forward(self, x, t, y):
        return self.transformer(x, timestep=t, class_labels=y).sample


# ------------------------------------------------------------------------------------------------


def load_into(pipe, path):
    """Quantize the pipeline's transformer with an exported file, and return the file's metadata;
    InputError, and nothing changed, if the file is damaged or is of another network."""
    tensors, metadata = load_safetensors(path, "made by common/export.py")
    transformer, device = pipe.transformer, pipe.transformer.device
    with reading(path):
        try:
            need(METADATA in metadata, "common/export.py has not made it")
            about = read_json(metadata[METADATA])
            check_fit(about, tensors, transformer)
        except Fault as fault:
            raise InputError(f"{path} does not go with this pipeline: {fault}") from fault
    own, blocks = of_layers(tensors), transformer.transformer_blocks
    layers = {name: make_layer(entry, own.pop(name)) for name, entry in about["layers"].items()}
    for layer, parameters in own.items():
        for name in copies_of(layer, len(blocks)):
            for key, x in parameters.items():
                transformer.get_submodule(name).get_parameter(key).data = x
    swap_layers(transformer, layers, TimeGroup(about["first_timesteps"]))
    for block in blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = about["downscale_freq_shift"]
        block.norm3.eps = about["norm_eps"]
    transformer.to(device).eval().requires_grad_(False)
    return about


def of_layers(tensors):
    """{layer: {name within it: tensor}}."""
    found = {}
    for name, x in tensors.items():
        layer, _, key = name.rpartition(".")
        found.setdefault(layer, {})[key] = x
    return found


def check_fit(about, tensors, transformer):
    """Fault unless the file's metadata and tensors are those of this transformer, as it is before
    it is quantized."""
    depth, config = len(transformer.transformer_blocks), dict(transformer.config)
    stored = {theirs for names in layer_names(depth).values() for theirs in names}
    stored -= {other for name in stored for other in copies_of(name, depth)[1:]}
    check_about(about, stored)
    need({"num_attention_heads", "sample_size"} <= about["config"].keys(), "config lacks its heads")
    config["out_channels"] = transformer.out_channels
    for key, value in about["config"].items():
        need(config.get(key) == value, f"{key} is {told(value)}, and {told(config.get(key))} here")
    spec, own = {}, of_layers(tensors)
    for name, x in transformer.named_parameters():
        need(x.dtype == torch.float32, "load the pipeline in float32")
        layer = name.rpartition(".")[0]
        if layer in stored and layer not in about["layers"]:
            spec[name] = TensorOf(FLOAT, " ".join(map(str, x.shape)))
    for name, entry in about["layers"].items():
        shape = None
        if "weight" in entry:
            layer = transformer.get_submodule(name)
            need(type(layer) in (nn.Linear, nn.Conv2d), f"its {name} is quantized already")
            shape = layer.weight.shape
        found = layer_spec(entry, own.get(name, {}), shape)
        spec |= {f"{name}.{key}": value for key, value in found.items()}
    check(tensors, spec, "", dict(groups=about["sampling"]["groups"]))


def swap_layers(transformer, layers, time_group):
    """Put the layers in the places of those they stand for, and the products into attention."""
    blocks = transformer.transformer_blocks
    products = {}
    for name, layer in layers.items():
        if isinstance(layer, QuantMatMul):
            attention, _, child = name.rpartition(".")
            products.setdefault(attention, {})[child] = layer
        else:
            for copy in copies_of(name, len(blocks)):
                parent, _, child = copy.rpartition(".")
                setattr(transformer.get_submodule(parent), child, InGroup(layer, time_group))
    for attention, pair in products.items():
        processor = QuantizedAttention(pair, time_group)
        transformer.get_submodule(attention).set_processor(processor)
    transformer.register_forward_pre_hook(time_group.listen, with_kwargs=True)
