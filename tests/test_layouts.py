"""common/export_layouts.py and diffusers_file.py on single tensors: what the format holds, and what
is no file of it."""

import pytest
import torch

import quant_ops as q
from common import quant_file, weight_files
from common.checks import Fault, check
from common.diffusers_file import check_about, codes_spec, layer_spec, rising
from common.diffusers_pipeline import TimeGroup
from common.errors import InputError
from common.export_layouts import first_timesteps, linear_tensors
from models_dit import TRAIN_TIMESTEPS


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_of_k_bits_are_no_more(bits):
    """-2^(k-1)..2^(k-1) - 1, both ends among them."""
    half = 2 ** (bits - 1)
    ends = torch.tensor([-half, half - 1], dtype=torch.int8)
    check(ends, codes_spec(bits, "2"), "x", {})
    for off in (-1, 1):
        with pytest.raises(Fault):
            check(ends + off, codes_spec(bits, "2"), "x", {})


def test_one_scale_for_all_of_a_weight():
    """(1,), in each part of qkv; s (q - z) is the quant file's weight."""
    layer = torch.nn.Linear(4, 12)
    W = layer.weight.detach()
    Q_W, _ = q.uniform_candidates(*W.aminmax(), 6)
    state = quant_file.linear_state(layer, Q_W(W), Q_W, q.FullPrecision())
    found = linear_tensors("blocks.0.attn.qkv", state, ["q", "k", "v"])
    parts = quant_file.unpack_weight(state["weight"]).chunk(3)
    for (tensors, _), part in zip(found.values(), parts, strict=True):
        s, z = tensors["weight_scale"], tensors["weight_zero_point"]
        assert s.shape == z.shape == (1,)
        assert torch.equal(s * (tensors["weight"].float() - z.float()), part)


def test_groups_that_are_no_runs_are_refused_both_ways():
    """Time groups rise with the timestep, from 0 on."""
    table = torch.arange(TRAIN_TIMESTEPS) // 500
    assert first_timesteps(table, "f") == [0, 500]
    for bad in (table.flip(0), table * 2, table + 1):
        with pytest.raises(InputError, match="f: its time groups are not runs"):
            first_timesteps(bad, "f")
    rising([0, 500], "x", dict(groups=2))
    for bad in ([1, 500], [0, 0], [0]):
        with pytest.raises(Fault):
            rising(bad, "x", dict(groups=2))


def test_time_group_of_whatever_timestep_a_scheduler_asks_for():
    """Between those that begin a group, beyond both ends, no whole numbers; by place or name."""
    group = TimeGroup([0, 400, 799])
    expected = {0: 0, 399: 0, 399.6: 1, 400: 1, 798.4: 1, 799: 2, 1000: 2, -1: 0}
    for t, i in expected.items():
        group.listen(None, (), dict(timestep=torch.tensor([t])))
        assert group.now.tolist() == [i]
    group.listen(None, (torch.zeros(1), torch.tensor([999])), {})
    assert group.now.tolist() == [2]


def test_a_weight_has_a_uniform_grid():
    """Other grids are those of activations."""
    entry = dict(weight=dict(type="gelu", bits=8), input=dict(type="none"))
    about = dict(
        version=1, method="m", wbits=8, abits=8, first_timesteps=[0], downscale_freq_shift=0,
        norm_eps=1e-6, config={}, checkpoint_sha256="0" * 64, quant_sha256="0" * 64,
        sampling=dict(steps=5, groups=1, cfg_scale=1.5, cfg_channels=3, vae="mse"),
    )  # fmt: skip
    for kind, fits in (("uniform", True), ("gelu", False)):
        layers = dict(a=entry | dict(weight=dict(type=kind, bits=8)))
        if fits:
            check_about(about | dict(layers=layers), {"a"})
        else:
            with pytest.raises(Fault, match="layers.a.weight is not uniform"):
                check_about(about | dict(layers=layers), {"a"})


def test_the_convolution_s_inputs_have_one_scale_and_are_not_smoothed():
    """A linear layer's may have one for each time group, and factors."""
    entry = {side: dict(type="uniform", bits=8) for side in ("weight", "input")}
    tensors = dict(input_smooth=torch.ones(4), input_scale=torch.ones(3))
    linear, conv = (layer_spec(entry, tensors, shape) for shape in ((6, 4), (6, 4, 2, 2)))
    assert linear.keys() - conv.keys() == {"input_smooth"}
    for scale, groups in ((torch.ones(1), 1), (torch.ones(3), 3)):
        check(scale, linear["input_scale"], "x", dict(groups=groups))
    check(torch.ones(1), conv["input_scale"], "x", dict(groups=3))
    with pytest.raises(Fault):
        check(torch.ones(3), conv["input_scale"], "x", dict(groups=3))


def test_safetensors_are_the_same_bytes_in_any_order(tmp_path):
    """Of the names; those of a set come otherwise in every process."""
    x = {name: torch.ones(2) for name in "abc"}
    weight_files.save_safetensors(tmp_path / "1", x)
    weight_files.save_safetensors(tmp_path / "2", dict(reversed(x.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
