"""What a quant file holds, in the words of common/checks.py: its layers against its config.

A method with an entry of its own adds it to QUANT; with a layer of its own, see layer_schema.py.
"""

import math

from common import model_schema as shared
from common.checks import Float, Optional, TensorOf, check, need, told
from common.layer_schema import BITS, LAYER_SPECS
from common.model_schema import FLOAT, INT, SHA256, TEXT
from models_dit import TRAIN_TIMESTEPS

DECIBEL, COST = Float(-math.inf, math.inf), Float(0, math.inf)


def any_dict(value, name, sizes):
    need(isinstance(value, dict), f"{name} is {told(value)}, not a dict")


NOISE = dict(  # that the sampler corrects, of each timestep; PTQD's
    slope=TensorOf(FLOAT, "steps", above=-1),
    bias=TensorOf(FLOAT, "steps channels"),
    std=TensorOf(FLOAT, "steps", above=-1),
)
SETTINGS = dict(wbits=BITS, abits=BITS, eps=Optional(shared.EPS), sampling=shared.SAMPLING)
QUANT = shared.HEAD | dict(
    method=TEXT,
    settings=shared.open_dict(SETTINGS),
    inputs=dict(checkpoint=SHA256, calib=SHA256, grads=Optional(SHA256)),
    config=shared.model_config,
    group_table=TensorOf(INT, str(TRAIN_TIMESTEPS), above=-1, below="steps"),
    layers=any_dict,
    state=any_dict,
    noise=Optional(NOISE),
    report=any_dict,
)


def quant(value, name, sizes):
    """A quant file, of any method: sizes first, so that no more is made of it than it holds."""
    check(value, QUANT, name, sizes)
    both = [key in value[part] for part, key in (("settings", "eps"), ("inputs", "grads"))]
    need(len(set(both)) == 1, "one of settings.eps and inputs.grads is missing")
    shared.check_sampling(value["settings"]["sampling"], "settings.sampling", sizes)
    layers, depth = value["layers"], sizes["depth"]
    found = shared.count_blocks([*value["state"], *layers])
    need(found == depth, f"config.depth is {depth}, yet there are {found} blocks")
    by_timestep = int(value["group_table"].max()) >= sizes["groups"]  # which layers regroup
    own = dict(sizes, groups=sizes["steps"]) if by_timestep else sizes
    check(layers, shared.of_all_blocks(LAYER_SPECS, depth), "layers", own)
    check(value["state"], shared.parameters(depth, FLOAT, without=layers), "state", sizes)
    of_groups, costs = [DECIBEL] * sizes["groups"], dict.fromkeys(layers, COST)
    report = dict(snr_per_group=of_groups, snr_weighted=DECIBEL, costs=costs)
    check(value["report"], report, "report", sizes)
