"""What each kind of file holds, in the words of common/checks.py. Checked on every load."""

import math

import torch

from common import model_schema as shared
from common.checks import Fault, Int, OneOf, Optional, TensorOf, Text, agree, check, need, told
from common.errors import InputError
from common.model_schema import FLOAT, FORMAT, HEAD, INT, SAMPLING, SHA256, TEXT
from common.quant_schema import quant
from models_dit import TRAIN_TIMESTEPS
from quant_ops import time_group

# ------------------------------------------------------------------------------------------------
# calib.pt and grads/


def calib_settings(value, name, sizes):
    """What Phase 1 decided, n G rows among it."""
    own = dict(per_group=Int(1, size="per_group"), trajectories=Int(1), seed=Int(0), ckpt=TEXT)
    check(value, SAMPLING | own | dict(config=shared.model_config), name, sizes)
    shared.check_sampling(value, name, sizes)
    agree(sizes, dict(rows=sizes["per_group"] * sizes["groups"]))


def rows(count):
    """So many tuples of Eq. (10), of all time groups."""
    whole = dict(trajectory=math.inf, t="steps", group="groups", y="labels")
    columns = {key: TensorOf(INT, count, above=-1, below=below) for key, below in whole.items()}
    columns |= dict.fromkeys(("x", "x_0"), TensorOf(FLOAT, f"{count} channels height height"))

    def complete(value, name, sizes):
        check(value, columns, name, sizes)
        of_t = time_group(value["t"], sizes["steps"], sizes["groups"])
        need(torch.equal(value["group"], of_t), f"{name}.group is not that of t, Eq. (9)")
        need(len(of_t.unique()) == sizes["groups"], f"{name} has no rows of some time group")

    return complete


CALIB = HEAD | dict(
    settings=calib_settings,
    inputs=dict(checkpoint=SHA256),
    calibration=rows("rows"),
    validation=rows("held_out"),
)
TOKENS, CONDITION = TensorOf(FLOAT, "rows tokens width"), TensorOf(FLOAT, "rows width")
UNIT_INPUTS = [
    TensorOf(FLOAT, "rows channels height height"),
    TensorOf(INT, "rows", above=-1, below=TRAIN_TIMESTEPS),
    TensorOf(INT, "rows", above=-1, below="labels"),
]
UNITS = {
    "embed": dict(unit_inputs=UNIT_INPUTS, unit_grads=[TOKENS, CONDITION]),
    "block": dict(unit_grads=[TOKENS]),
    "final": dict(unit_grads=[TensorOf(FLOAT, "rows tokens outputs")]),
}


def grads(value, name, sizes):
    """What Phase 2 writes of a unit; with the sizes of calib.pt, for that one."""
    unit = Text(r"embed|final|block_\d{2,5}")
    unit(value.get("unit"), "unit", sizes)
    own = dict(settings=dict(eps=shared.EPS), inputs=dict(calib=SHA256), unit=unit)
    check(value, HEAD | own | UNITS[value["unit"].partition("_")[0]], name, sizes)


# ------------------------------------------------------------------------------------------------
# samples_*.npz, its meta

IMAGES = dict(num_images=Int(1), first=Int(0), seed=Int(0), classes=shared.ANY, name=TEXT)
IMAGES |= dict(dtype=OneOf("fp32", "bf16"))
MAY_COME_FROM = "calib", "grads", "quant", "vae"
SAMPLES = HEAD | dict(
    settings=shared.open_dict({key: x for key, x in SAMPLING.items() if key != "groups"} | IMAGES),
    inputs=dict(checkpoint=SHA256) | dict.fromkeys(MAY_COME_FROM, Optional(SHA256)),
    model_bytes=Int(1),
)

# ------------------------------------------------------------------------------------------------
# All of them

SCHEMAS = dict(calib=CALIB, grads=grads, quant=quant, samples=SAMPLES)


def sizes_of(calib):
    """The sizes that calib.pt gives, for files that must agree with it."""
    sizes = {}
    check(calib["settings"], calib_settings, "settings", sizes)
    return sizes


def check_artifact(artifact, kind, path, made_by, sizes=None):
    """InputError unless it is all that an artifact of this kind must be."""
    found = artifact.get("kind") if isinstance(artifact, dict) else None
    if type(found) is not str or found != kind:
        found = found[:60] if type(found) is str else "no artifact"
        raise InputError(f"{path} is {found}, not {kind}: run {made_by} first")
    found = told(artifact.get("format"))
    if found != told(FORMAT):
        raise InputError(f"{path} has format {found}, not {FORMAT}: run {made_by} again")
    try:
        check(artifact, SCHEMAS[kind], "", dict(sizes or {}))
    except Fault as fault:
        raise InputError(f"{path} is damaged: {fault}; run {made_by} --force") from fault
