"""The two namings of a DiT's parameters: the official one, and diffusers' DiTTransformer2DModel.

Nothing is transposed and no chunk is swapped. diffusers cuts `qkv` in three along its rows, keeps
a copy of the embedders in every block, and stores no position embedding.
"""

import torch

from common.checks import Int, check, need, told
from models_dit import sincos_pos_embed

NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "blocks.{}.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
QKV = "blocks.{}.attn.qkv"
IN_THREE = [f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv"]
EMBEDDERS = {  # of which every block has a copy
    "t_embedder.mlp.0": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table",
}
PRODUCTS = {  # attention's, without parameters; these two names are ours
    "blocks.{}.attn.qk": "transformer_blocks.{}.attn1.qk",
    "blocks.{}.attn.av": "transformer_blocks.{}.attn1.av",
}
MAX_GRID = 128  # tokens in a row that we make positions for: nothing in a file bounds them
SAME_NETWORK = dict(  # what config.json must say, if anything, for the network to be a DiT
    activation_fn="gelu-approximate",
    attention_bias=True,
    norm_elementwise_affine=False,
    norm_type="ada_norm_zero",
)


def is_diffusers(state):
    """Whether a state dict has diffusers' names."""
    return isinstance(state, dict) and any(str(k).startswith("transformer_blocks.") for k in state)


def count_blocks(state):
    """How many blocks the names of diffusers speak of."""
    blocks = (name.split(".")[1] for name in state if name.startswith("transformer_blocks."))
    return len(set(blocks))


def layer_names(depth):
    """Official name of a layer -> its names in diffusers: one, of `qkv` three, of the embedders'
    layers one for every block."""
    names = {ours: [theirs] for ours, theirs in NAMES.items() if "{}" not in ours}
    names |= {ours: [theirs.format(i) for i in range(depth)] for ours, theirs in EMBEDDERS.items()}
    for i in range(depth):
        for ours, theirs in (NAMES | PRODUCTS).items():
            names[ours.format(i)] = [theirs.format(i)]
        names[QKV.format(i)] = [theirs.format(i) for theirs in IN_THREE]
    return names


def copies_of(name, depth):
    """The layers of all blocks that are the one of this name; it is in block 0, or the only one."""
    for copy in EMBEDDERS.values():
        if name == copy.format(0):
            return [copy.format(i) for i in range(depth)]
    return [name]


def parameter_names(depth):
    """The same of every parameter but `pos_embed`."""
    products = {ours.format(i) for ours in PRODUCTS for i in range(depth)}
    names = {}
    for layer, theirs in layer_names(depth).items():
        for part in ("weight",) if "embedding_table" in layer else ("weight", "bias"):
            if layer not in products:
                names[f"{layer}.{part}"] = [f"{name}.{part}" for name in theirs]
    return names


def cut(layer, x):
    """A tensor of an official layer, output channels first, as those of its layers in diffusers."""
    return list(x.chunk(3)) if layer.endswith("attn.qkv") else [x]


def to_diffusers(state, depth, copies=True):
    """Official parameters under diffusers' names, less `pos_embed`; without `copies` the embedders'
    stand in block 0 alone, and with them they share their memory."""
    found, names = {}, parameter_names(depth)
    for name in state.keys() - {"pos_embed"}:
        parts = cut(name.rpartition(".")[0], state[name])
        targets = names[name] if copies else names[name][: len(parts)]
        found |= dict(zip(targets, parts * (len(targets) // len(parts)), strict=True))
    return found


def from_diffusers(state, told_by_file, num_heads, input_size):
    """(official state dict, number of heads) of a state dict of diffusers. Without config.json the
    heads are as given, and so is the size of x, if it is a latent."""
    if told_by_file:
        told_heads, input_size = map(told_by_file.get, ("num_attention_heads", "sample_size"))
        what = "num_attention_heads and sample_size of its config.json"
        check([told_heads, input_size], [Int(1, 2**16)] * 2, what, {})
        same = num_heads in (None, told_heads)
        need(same, f"its config.json says {told_heads} heads, not {num_heads}")
        num_heads = told_heads
    else:
        weight = state.get("pos_embed.proj.weight")
        latent = getattr(weight, "ndim", 0) == 4 and weight.shape[1] == 4
        need(latent and input_size, "the size of x is not in it: put its config.json beside it")
    return to_official(state, input_size), num_heads


def to_official(state, input_size):
    """A state dict of diffusers under the official names, for an x of this size; Fault if it is
    not one of a DiT."""
    for name, x in state.items():
        need(isinstance(name, str), f"it has the name {told(name)}")
        whole = isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type == "cpu"
        need(whole and x.layout is torch.strided, f"{name} is {told(x)}, not a tensor of floats")
    left, found = dict(state), {}
    for name, theirs in parameter_names(count_blocks(state)).items():
        for x in theirs:
            need(x in left, f"{x} is missing")
        parts = {x: left.pop(x) for x in theirs}
        found[name] = torch.cat([*parts.values()]) if ".qkv." in name else the_copy(parts)
    need(not left, f"{next(iter(left), '')} is no parameter of a DiT")
    found["pos_embed"] = positions(found["x_embedder.proj.weight"], input_size)
    return found


def the_copy(parts):
    """The tensor that all of these are; Fault names the first that is another."""
    (first, x), *others = parts.items()
    for name, other in others:
        same = x.dtype == other.dtype and torch.equal(x, other)
        need(same, f"{name} is not equal to {first}: the blocks' embedders must be copies")
    return x


def positions(weight, input_size):
    """The position embedding that goes with the patch embedding's weight (D, C, p, p)."""
    need(weight.ndim == 4, f"pos_embed.proj.weight is {told(weight)}")
    width, patch = weight.shape[0], weight.shape[2]
    fits = patch > 0 and width > 0 and input_size % patch == 0 and width % 4 == 0
    need(fits, f"pos_embed.proj.weight, {told(weight)}, does not go with x of {input_size} pixels")
    need(input_size // patch <= MAX_GRID, f"x of {input_size} pixels makes too many tokens")
    return sincos_pos_embed(width, input_size // patch)


def diffusers_config(config):
    """What a config.json of diffusers says of the network that has these DiT keywords."""
    heads, channels = config["num_heads"], config["in_channels"]
    return SAME_NETWORK | dict(
        attention_head_dim=config["hidden_size"] // heads,
        in_channels=channels,
        num_attention_heads=heads,
        num_embeds_ada_norm=config["num_classes"],
        num_layers=config["depth"],
        out_channels=channels * 2 if config["learn_sigma"] else channels,
        patch_size=config["patch_size"],
        sample_size=config["input_size"],
    )


def check_config(told_by_file, config):
    """Fault unless a config.json says of the network what its weights say, where it says it."""
    for key, value in diffusers_config(config).items():
        found = told_by_file.get(key)
        same = found is None or type(found) is type(value) and found == value
        need(same, f"its config.json says {key} = {told(found)}, and it is {told(value)}")
