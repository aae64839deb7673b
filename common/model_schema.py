"""What the files have in common: a header, how to sample, and the network's shape and parameters.

In the words of common/checks.py. Of its sizes, `hidden` is the MLP's width, `labels` counts the
null label too, and `outputs` are those of one token.
"""

import torch

from common.checks import Float, Int, OneOf, Plain, TensorOf, Text, agree, check, need
from models_dit import TRAIN_TIMESTEPS

FORMAT = 2
FLOAT, INT = (torch.float32,), (torch.int64,)
ANY_FLOAT = torch.float32, torch.float16, torch.bfloat16, torch.float64  # of checkpoints
ANY, TEXT, SHA256 = Plain(), Text(), Text("[0-9a-f]{64}")
HEAD = dict(kind=TEXT, format=OneOf(FORMAT), torch=TEXT, device=TEXT, git=TEXT)
EPS = OneOf("implied", "renoise")

# ------------------------------------------------------------------------------------------------
# Settings and the network's shape

CONFIG = dict(
    input_size=Int(1, 2**16, "height"),
    patch_size=Int(1, 2**16, "patch"),
    in_channels=Int(1, 2**16, "channels"),
    hidden_size=Int(1, 2**16, "width"),
    depth=Int(1, 2**16, "depth"),
    num_heads=Int(1, 2**16, "heads"),
    mlp_ratio=Float(2**-16, 2**16),
    num_classes=Int(1, 2**32),
    learn_sigma=OneOf(True, False),
)
SAMPLING = dict(
    steps=Int(1, TRAIN_TIMESTEPS, "steps"),
    groups=Int(1, TRAIN_TIMESTEPS, "groups"),
    cfg_scale=Float(),
    cfg_channels=Int(1),
    vae=OneOf("mse", "ema", "none"),
)


def model_config(value, name, sizes):
    """The DiT constructor's keywords."""
    check(value, CONFIG, name, sizes)
    height, patch, width = (sizes[size] for size in ("height", "patch", "width"))
    need(height % patch == 0, f"{name}.patch_size {patch} does not divide input_size {height}")
    need(width % sizes["heads"] == 0, f"{name}.num_heads does not divide hidden_size {width}")
    of_a_pixel = sizes["channels"] * (2 if value["learn_sigma"] else 1)
    derived = dict(
        tokens=(height // patch) ** 2,
        hidden=round(width * value["mlp_ratio"]),
        labels=value["num_classes"] + 1,
        outputs=patch**2 * of_a_pixel,
    )
    agree(sizes, derived)


def check_sampling(value, name, sizes):
    """Fault unless G is at most T, and the VAE goes with the network."""
    groups, steps, channels = sizes["groups"], sizes["steps"], sizes["channels"]
    need(groups <= steps, f"{name}.groups is {groups}, above steps, {steps}")
    need(decodes(value["vae"], channels), f"{name}.vae does not go with {channels} channels")


def decodes(vae, channels):
    """Whether samples of so many channels are what this VAE decodes; `none`: they are pixels."""
    return channels in ((1, 3) if vae == "none" else (4,))


def open_dict(spec):
    """A dict with these entries, and others of texts and numbers."""

    def with_others(value, name, sizes):
        ANY(value, name, sizes)
        others = dict.fromkeys(value, ANY) if isinstance(value, dict) else {}
        check(value, others | spec, name, sizes)

    return with_others


# ------------------------------------------------------------------------------------------------
# The network's parameters, in a checkpoint and in a quant file

WEIGHTS = {  # of the layers; a bias has the first of these sizes
    "x_embedder.proj": "width channels patch patch",
    "t_embedder.mlp.0": "width 256",
    "t_embedder.mlp.2": "width width",
    "blocks.{}.attn.qkv": "3*width width",
    "blocks.{}.attn.proj": "width width",
    "blocks.{}.mlp.fc1": "hidden width",
    "blocks.{}.mlp.fc2": "width hidden",
    "blocks.{}.adaLN_modulation.1": "6*width width",
    "final_layer.linear": "outputs width",
    "final_layer.adaLN_modulation.1": "2*width width",
}
TABLES = {"pos_embed": "1 tokens width", "y_embedder.embedding_table.weight": "labels width"}


def parameters(depth, dtypes, without=()):
    """Spec of the DiT's state dict, less the parameters of these layers."""
    shapes = dict(TABLES)
    for name, shape in of_all_blocks(WEIGHTS, depth).items():
        if name not in without:
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape.split()[0]}
    return {name: TensorOf(dtypes, shape) for name, shape in shapes.items()}


def of_all_blocks(table, depth):
    """The table with an entry for every block in place of that of "blocks.{}"."""
    return {
        name.format(i): x for name, x in table.items() for i in range(depth if "{" in name else 1)
    }


def count_blocks(names):
    """How many blocks these names speak of."""
    names = (name for name in names if isinstance(name, str))
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})
