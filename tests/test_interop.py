"""docs/interop.md: checkpoints and VAEs of diffusers in, exported quant files out.

What needs diffusers, or the packages that read the files, is skipped where they are not.
"""

import copy
import functools
import json
import shutil
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    LIVELY,
    ROOT,
    STATIC,
    lively_dit,
    refused,
    run_in_process,
    same_images,
    snapshot,
    tiny_flags,
)  # fmt: skip
from PIL import Image

import quant_ops as q
from common import quant_file, weight_files
from common.artifacts import provenance, save_artifact, sha256_of
from common.checkpoints import find_checkpoint, load_dit
from common.diffusers_names import diffusers_config, is_diffusers, to_diffusers, to_official
from common.diffusers_pipeline import AsDiT, load_into
from common.errors import InputError
from common.export_layouts import delta_tensors
from common.images import to_uint8
from common.vae import VAEDecoder, convert_vae, load_vae
from models_dit import LAYERS, Diffusion, DiT, DiT_models, MatMul, image_generators, trajectory

SIZES = [{}, dict(in_channels=1, learn_sigma=False, depth=1), dict(patch_size=4, num_heads=1)]
PLUS = "--wbits 4 --abits 8"


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def safetensors():
    return pytest.importorskip("safetensors.torch")


def config_of(**changes):
    return LIVELY | dict(mlp_ratio=4.0, learn_sigma=True) | changes


def random_transformer(diffusers, **changes):
    """A DiTTransformer2DModel of the lively sizes with large random weights, the blocks' embedders
    copies of each other as in every published one, the constants as diffusers has them."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**diffusers_config(config_of(**changes))).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model.requires_grad_(False)


def with_official_constants(model):
    """The two differences that lie in the network; the others are in how a pipeline samples."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return model


def some_inputs(config, count=3):
    """x, t, y of a network."""
    torch.manual_seed(1)
    x = torch.randn(count, config["in_channels"], config["input_size"], config["input_size"])
    return x, torch.tensor([3, 470, 999])[:count], torch.tensor([0, 2, 5])[:count]


def answers(model, x, t, y):
    return model(x, timestep=t, class_labels=y).sample


# ------------------------------------------------------------------------------------------------
# In: the namings


@pytest.mark.parametrize("changes", SIZES)
def test_official_names_survive_the_way_to_diffusers_and_back(changes):
    """Every parameter and the recomputed positions, bit for bit."""
    model = lively_dit(**changes)
    theirs = to_diffusers(model.state_dict(), len(model.blocks))
    assert is_diffusers(theirs) and not is_diffusers(model.state_dict())
    ours = to_official(theirs, model.input_size)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(x, ours[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", DiT_models)
def test_names_and_shapes_are_those_of_diffusers_at_every_published_size(diffusers, name):
    """All parameters of DiTTransformer2DModel and no others, each of its shape."""
    with torch.device("meta"):
        ours = DiT(**DiT_models[name])
        config = config_of() | dict(in_channels=4, input_size=32, num_classes=1000)
        theirs = diffusers.DiTTransformer2DModel(**diffusers_config(config | DiT_models[name]))
    found = to_diffusers(ours.state_dict(), len(ours.blocks))
    assert {k: x.shape for k, x in found.items()} == {
        k: x.shape for k, x in theirs.state_dict().items()
    }


@pytest.mark.parametrize("changes", SIZES)
def test_model_of_diffusers_gives_its_own_answers(diffusers, safetensors, tmp_path, changes):
    """Read from its folder: our forward pass is its own, with the official constants, and not with
    those of diffusers."""
    model = random_transformer(diffusers, **changes)
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    ours, config = load_dit(find_checkpoint(tmp_path / "pipeline", None, 256))
    assert config == config_of(**changes)
    inputs = some_inputs(config)
    unpatched = answers(model, *inputs)
    expected = answers(with_official_constants(model), *inputs)
    assert (ours(*inputs) - expected).abs().max() < 1e-5
    assert (ours(*inputs) - unpatched).abs().max() > 1e-3


def variants(folder, model):
    """The same model as people keep it; those without a config.json need flags."""
    half = {name: x.half() for name, x in model.state_dict().items()}
    official = to_official(model.state_dict(), 8)
    model.save_pretrained(folder / "bin" / "transformer", safe_serialization=False)
    model.half().save_pretrained(folder / "fp16", variant="fp16")
    alone = folder / "alone.safetensors"
    weight_files.save_safetensors(alone, half)
    torch.save(half, folder / "alone.bin")
    torch.save({f"module.{k}": x.half() for k, x in official.items()}, folder / "parallel.pt")
    return [folder / "bin", folder / "bin" / "transformer", folder / "fp16", alone,
            folder / "alone.bin", folder / "parallel.pt"]  # fmt: skip


def test_every_kind_of_checkpoint_is_the_same_network(diffusers, safetensors, tmp_path):
    """Folders, lone files, a parallel model's prefix, half precision: the weights are equal."""
    model = random_transformer(diffusers)
    found = [
        load_dit(find_checkpoint(path, None, 256), num_heads=3, input_size=8)
        for path in variants(tmp_path, model)
    ]
    first = {k: x.half() for k, x in found[0][0].state_dict().items()}
    for loaded, config in found:
        assert config == config_of()
        for name, x in loaded.state_dict().items():
            assert x.dtype == torch.float32 and torch.equal(x.half(), first[name])


def test_load_dit_says_which_copy_of_the_embedders_differs(tmp_path):
    """One value of one block changed is one line that names the block."""
    state = to_diffusers(lively_dit().state_dict(), 2)
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    state[name] = state[name].clone()
    state[name][0, 0] += 1e-6
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(InputError, match=rf"{name} is not equal to transformer_blocks\.0"):
        load_dit(tmp_path / "a.bin", num_heads=3, input_size=8)


def test_calibration_is_that_of_the_official_file(
    diffusers, safetensors, tiny_ckpt, tiny_run, tmp_path, run_here
):
    """01 on a diffusers folder: the calib.pt of the official file but for the checkpoint's name and
    sha256, which is that of the weights file; 02 finds it again."""
    official = torch.load(tiny_ckpt, weights_only=True)
    config = load_dit(tiny_ckpt, num_heads=4)[1]
    model = diffusers.DiTTransformer2DModel(**diffusers_config(config))
    model.load_state_dict(to_diffusers(official, config["depth"]))
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    flags = tiny_flags("01_collect_calib", tmp_path / "run", tmp_path / "pipeline")
    assert run_here("01_collect_calib", *flags).returncode == 0
    ours, theirs = (
        torch.load(run / "calib.pt", weights_only=True) for run in (tiny_run, tmp_path / "run")
    )
    assert torch.equal(ours["calibration"]["x"], theirs["calibration"]["x"])
    assert ours["settings"]["config"] == theirs["settings"]["config"]
    weights = theirs["settings"]["ckpt"]
    assert weights.endswith("transformer/diffusion_pytorch_model.safetensors")
    assert theirs["inputs"]["checkpoint"] == sha256_of(weights)
    assert run_here("02_grad_cache", "--run", tmp_path / "run").returncode == 0


# ------------------------------------------------------------------------------------------------
# In: files that are not what they should be

F32 = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
HOSTILE = {  # header of a safetensors file, or its raw bytes; 8 bytes of tensors follow
    "huge header": b"\xff" * 7 + b"\x7f",
    "header of no JSON": struct.pack("<Q", 5) + b"hello",
    "overlapping offsets": {"a": F32, "b": F32 | dict(data_offsets=[4, 12])},
    "unknown dtype": {"a": F32 | dict(dtype="Q7")},
    "more than the file": {"a": F32 | dict(shape=[2**20], data_offsets=[0, 2**22])},
    "beyond 64 bits": {"a": F32 | dict(shape=[2**40, 2**40])},
    "negative size": {"a": F32 | dict(shape=[-2])},
    "dtype and size disagree": {"a": F32 | dict(dtype="I8")},
    "other names": {"a": F32},
    "names of blocks only": {"transformer_blocks.0.norm1.linear.weight": F32},
    "block of no number": {"transformer_blocks": F32, "transformer_blocks.": F32},
    "whole numbers": {"pos_embed.proj.weight": F32 | dict(dtype="I32"), "transformer_blocks.": F32},
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_01_refuses_hostile_safetensors(safetensors, tmp_path, run_here, header):
    """One line, status 2, nothing written."""
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text
    path = tmp_path / "a.safetensors"
    path.write_bytes(header + bytes(8))
    before = snapshot(tmp_path)
    refused(run_here("01_collect_calib", "--run", tmp_path / "run", "--ckpt", path), str(path))
    assert snapshot(tmp_path) == before


CONFIGS = {
    "no JSON": "{",
    "no object": "[]",
    "deep": "[" * 10**5,
    "long": json.dumps(dict(x="x" * 2**21)),
    "no heads": dict(sample_size=8),
    "heads a text": dict(num_attention_heads="3"),
    "heads beyond": dict(num_attention_heads=10**30),
    "other heads": dict(num_attention_heads=5),
    "half a pixel": dict(sample_size=8.5),
    "size for no patch": dict(sample_size=9),
    "size of too many tokens": dict(sample_size=2**16),
    "other layers": dict(num_layers=3),
    "another activation": dict(activation_fn="geglu"),
    "channels true": dict(in_channels=True),
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_load_dit_refuses_a_config_that_is_not_of_its_weights(tmp_path, change):
    """What config.json says is checked before anything of its size is made."""
    torch.save(to_diffusers(lively_dit().state_dict(), 2), tmp_path / "a.bin")
    good = diffusers_config(config_of())
    if isinstance(change, dict):
        change = json.dumps(change if change == CONFIGS["no heads"] else good | change)
    (tmp_path / "config.json").write_text(change)
    with pytest.raises(InputError, match="a.bin|config.json"):
        load_dit(tmp_path / "a.bin")
    (tmp_path / "config.json").write_text(json.dumps(good))
    assert load_dit(tmp_path / "a.bin")[1] == config_of()
    with pytest.raises(InputError, match="3 heads, not 4"):
        load_dit(tmp_path / "a.bin", num_heads=4)


def test_load_dit_does_not_guess_the_size_of_x(tmp_path):
    """A lone file of a network on pixels, and a folder that holds no weights, are refused."""
    state = to_diffusers(lively_dit(in_channels=1).state_dict(), 2)
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(InputError, match="config.json"):
        load_dit(tmp_path / "a.bin", num_heads=3, input_size=8)
    with pytest.raises(InputError, match="neither it nor its transformer/"):
        find_checkpoint(tmp_path, None, 256)


def test_01_takes_the_size_of_x_of_a_lone_file_from_image_size(tmp_path, run_here):
    """A lone file of a network on latents: 512 pixels are latents of 64."""
    model = lively_dit(input_size=64, patch_size=8)
    torch.save(to_diffusers(model.state_dict(), 2), tmp_path / "a.bin")
    tiny = "--image-size 512 --num-heads 3 --steps 2 --groups 1 --per-group 4 --trajectories 4"
    flags = ["--run", tmp_path / "run", "--ckpt", tmp_path / "a.bin", *tiny.split()]
    assert run_here("01_collect_calib", *flags).returncode == 0
    calib = torch.load(tmp_path / "run" / "calib.pt", weights_only=True)
    assert calib["settings"]["config"] == config_of(input_size=64, patch_size=8)


def test_without_safetensors_one_line_says_what_to_install(tmp_path, monkeypatch):
    """Its absence stops those alone who have such a file."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load_dit(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------
# In: the autoencoder of Stable Diffusion


OFFICIAL_VAE = {  # a part of a decoder's name -> that of the official files
    "up_blocks.0.": "up.1.",
    "up_blocks.1.": "up.0.",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "attn_1.group_norm": "attn_1.norm",
    "attn_1.to_out.0": "attn_1.proj_out",
    "attn_1.to_": "attn_1.",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def official_vae(state):
    """The state dict of a decoder of two blocks under the official names, its attention with 1x1
    convolutions, an encoder and what else is in such a file beside it."""
    named = {"encoder.conv_in.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    for name, x in state.items():
        for ours, theirs in OFFICIAL_VAE.items():
            name = name.replace(ours, theirs)
        named[name] = x[:, :, None, None] if ".attn_1." in name and x.ndim == 2 else x
    return {f"first_stage_model.{name}": x for name, x in named.items()}


@pytest.mark.parametrize("naming", ["diffusers", "official"])
def test_vae_of_diffusers_decodes_as_there(diffusers, naming):
    """A small AutoencoderKL under both namings: our decoder gives its images."""
    torch.manual_seed(0)
    kinds = dict(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2
    )
    theirs = diffusers.AutoencoderKL(block_out_channels=[32, 64], latent_channels=4, **kinds).eval()
    ours, state = VAEDecoder(widths=(32, 64), layers=2), theirs.state_dict()
    if naming == "official":
        state = official_vae(convert_vae(state))
        assert "first_stage_model.decoder.up.1.block.0.conv1.weight" in state
    ours.load_state_dict(convert_vae(state))
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(ours(z), theirs.decode(z).sample, atol=1e-5, rtol=0)


def test_04_decodes_with_a_local_vae(safetensors, tmp_path, run_here):
    """--vae-path takes a folder of half-precision safetensors, and its sha256 is recorded; a file
    of something else, and a VAE for pixels, are refused."""
    torch.save(lively_dit().state_dict(), tmp_path / "dit.pt")
    torch.manual_seed(0)
    vae = VAEDecoder().half()
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weight_files.save_safetensors(file, vae.state_dict())
    run, tiny = (
        tmp_path / "run",
        "--steps 2 --groups 1 --per-group 4 --trajectories 4 --num-heads 3",
    )
    flags = ["--run", run, "--ckpt", tmp_path / "dit.pt", *tiny.split()]
    assert run_here("01_collect_calib", *flags).returncode == 0
    flags = ["--run", run, "--fp", "--num-images", 1]
    refused(run_here("04_sample", *flags, "--vae-path", tmp_path / "dit.pt"), "is not the SD-VAE")
    assert run_here("04_sample", *flags, "--vae-path", tmp_path).returncode == 0
    with np.load(run / "samples_fp.npz") as found:
        meta, images = json.loads(str(found["meta"])), found["arr_0"]
    assert meta["inputs"]["vae"] == sha256_of(file) and images.shape == (1, 64, 64, 3)
    z = torch.randn(1, 4, 2, 2)
    assert torch.equal(load_vae("mse", tmp_path)(z), vae.float()(z))


# ------------------------------------------------------------------------------------------------
# Out: the exported file


def handmade(kind, by_group):
    """A quantizer of activations with scales out of thin air; one for each of three time groups."""
    scale = torch.tensor([0.03, 0.04, 0.05]) if by_group else torch.tensor(0.04)
    make = quant_file.QUANTIZERS[kind]
    values = dict(scale=scale, zero_point=scale * 0 + 120, scale1=scale / 100, scale2=scale)
    return make(8, *(values[name] for name in make.names)) if kind != "none" else make()


def handmade_layer(spec, module, by_group):
    """The state of a layer: MRQ where the paper has it, the rest uniform, of 8 bits."""
    if spec.name.startswith("attn.") and not isinstance(module, torch.nn.Linear):
        kind = "softmax" if spec.post_softmax else "uniform"
        return quant_file.matmul_state(handmade(kind, by_group), handmade("uniform", False))
    W = module.weight.detach().flatten(1)
    Q_W = q.uniform_candidates(*W.aminmax(dim=1, keepdim=True), 8)[0]
    kind = "none" if spec.reads_image else "gelu" if spec.post_gelu else "uniform"
    return quant_file.linear_state(module, Q_W(W), Q_W, handmade(kind, by_group))


def handmade_run(run, model, config, by_group=True):
    """RUN/quant_w8a8.pt of a model, whose scales no search has chosen."""
    units = dict(embed=[""], final=["final_layer."])
    units["block"] = [f"blocks.{i}." for i in range(config["depth"])]
    layers = {
        prefix + spec.name: handmade_layer(spec, model.get_submodule(prefix + spec.name), by_group)
        for spec in LAYERS
        for prefix in units[spec.unit]
        if not spec.conditioning
    }
    sampling = dict(steps=6, groups=3, cfg_scale=1.5, cfg_channels=3, vae="mse")
    settings = dict(wbits=8, abits=8, eps="implied", sampling=sampling)
    inputs = dict.fromkeys(("checkpoint", "calib", "grads"), "0" * 64)
    file = provenance("quant", settings, inputs, torch.device("cpu")) | dict(method="handmade")
    file |= quant_file.quantized_parts(model, config, layers, 6, 3)
    report = dict(snr_per_group=[1.0] * 3, snr_weighted=1.0, costs=dict.fromkeys(layers, 1.0))
    save_artifact(run / "quant_w8a8.pt", file | dict(report=report))


def exported(run, flags="--wbits 8 --abits 8"):
    """What common/export.py writes of a run; it must say so."""
    result = run_in_process("common/export", "--run", run, *flags.split())
    assert result.returncode == 0 and result.stdout.startswith("wrote "), result.stderr
    return result.stdout.split()[1].rstrip(",")


@pytest.fixture(scope="module")
def handmade_folder(tmp_path_factory):
    """A run of the lively DiT with 1000 classes, as the pipeline wants them; and its export."""
    run = tmp_path_factory.mktemp("handmade")
    handmade_run(run, lively_dit(num_classes=1000), config_of(num_classes=1000))
    exported(run)
    return run


@pytest.fixture(scope="module")
def plus_run(tiny_run, tmp_path_factory):
    """The tiny run's calibration and its quant files, one of all that tqdit_plus has too."""
    run = tmp_path_factory.mktemp("interop") / "run"
    shutil.copytree(tiny_run, run)
    result = run_in_process("methods/tqdit_plus", "--run", run, *PLUS.split(), *STATIC)
    assert result.returncode == 0, result.stderr
    return run


def test_export_holds_the_codes_of_the_quant_file(safetensors, handmade_folder):
    """s (q - z) of every part of qkv is its rows of the quant file's weight; the inputs' scales
    are there for each time group, and what stays in full precision is there once."""
    tensors, metadata = weight_files.load_safetensors(
        handmade_folder / "quant_w8a8.safetensors", ""
    )
    artifact = quant_file.load_quant(handmade_folder / "quant_w8a8.pt")
    qkv = artifact["layers"]["blocks.1.attn.qkv"]
    for i, part in enumerate("qkv"):
        name = f"transformer_blocks.1.attn1.to_{part}"
        codes, zero_point = tensors[f"{name}.weight"], tensors[f"{name}.weight_zero_point"]
        assert codes.dtype == zero_point.dtype == torch.int8
        found = tensors[f"{name}.weight_scale"] * (codes.float() - zero_point.float())
        assert torch.equal(found, quant_file.unpack_weight(qkv["weight"]).chunk(3)[i])
        assert torch.equal(tensors[f"{name}.bias"], qkv["bias"].chunk(3)[i])
        assert torch.equal(tensors[f"{name}.input_scale"], qkv["act"]["scale"])
        assert (tensors[f"{name}.input_zero_point"] == 120 - 128).all()
    assert torch.equal(
        tensors["transformer_blocks.0.attn1.av.a_scale1"],
        artifact["layers"]["blocks.0.attn.av"]["a"]["scale1"],
    )
    about = json.loads(metadata["tqdit"])
    layers = about.pop("layers")
    assert layers["transformer_blocks.0.ff.net.2"]["input"] == dict(type="gelu", bits=8)
    assert about == dict(
        version=1, method="handmade", wbits=8, abits=8, sampling=artifact["settings"]["sampling"],
        first_timesteps=[0, 400, 799], downscale_freq_shift=0, norm_eps=1e-6,
        config=diffusers_config(artifact["config"]), checkpoint_sha256="0" * 64,
        quant_sha256=sha256_of(handmade_folder / "quant_w8a8.pt"),
    )  # fmt: skip
    embedders = [name for name in tensors if ".emb." in name]
    assert len(embedders) == 5 and all("transformer_blocks.0." in name for name in embedders)


def test_export_writes_the_same_bytes_and_replaces_nothing(tmp_path, run_here, handmade_folder):
    """Same quant file, same bytes; a file that is there stays without --force."""
    shutil.copy(handmade_folder / "quant_w8a8.pt", tmp_path)
    path, flags = tmp_path / "quant_w8a8.safetensors", "--wbits 8 --abits 8"
    exported(tmp_path)
    assert path.read_bytes() == (handmade_folder / "quant_w8a8.safetensors").read_bytes()
    path.write_text("mine")
    refused(run_here("common/export", "--run", tmp_path, *flags.split()), "--force")
    assert path.read_text() == "mine"
    exported(tmp_path, flags + " --force")
    assert path.stat().st_size > 1000


def test_export_refuses_what_it_cannot_hold(tmp_path, run_here, handmade_folder):
    """No quant file; for compressed-tensors one with time groups: one line, nothing written."""
    refused(run_here("common/export", "--run", tmp_path, *PLUS.split()), "no such file")
    shutil.copy(handmade_folder / "quant_w8a8.pt", tmp_path)
    before = snapshot(tmp_path)
    flags = "--wbits 8 --abits 8 --layout compressed-tensors"
    refused(run_here("common/export", "--run", tmp_path, *flags.split()), "one static scale")
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------------
# Out: into a pipeline


def test_export_says_which_file_and_which_bits(safetensors, handmade_folder, tmp_path):
    """What came from where, no two of them alike."""
    file = torch.load(handmade_folder / "quant_w8a8.pt", weights_only=True)
    file["inputs"] = dict(checkpoint="1" * 64, calib="2" * 64, grads="3" * 64)
    file["settings"]["abits"] = 6
    torch.save(file, tmp_path / "quant_w8a6.pt")
    path = exported(tmp_path, "--wbits 8 --abits 6")
    about = json.loads(weight_files.load_safetensors(path, "")[1]["tqdit"])
    assert (about["wbits"], about["abits"], about["checkpoint_sha256"]) == (8, 6, "1" * 64)
    assert about["quant_sha256"] == sha256_of(tmp_path / "quant_w8a6.pt")


GROUPED = dict(view=[96, 2, 12], scale=torch.ones(96, 2, 1))
GROUPED |= dict(zero_point=GROUPED["scale"].to(torch.uint8))
NO_PLACE = {
    "dynamic": (
        "blocks.0.attn.qk",
        "a",
        dict(type="dynamic", bits=8, per="token", group_size=None),
    ),
    "biases": ("blocks.0.mlp.fc2", "bias", torch.zeros(3, 24)),
    "shift": ("blocks.0.mlp.fc2", "shift", torch.zeros(96)),
    "hadamard": ("blocks.0.mlp.fc2", "hadamard", 32),
    "view": ("blocks.0.mlp.fc1", "weight", GROUPED),
}


@pytest.mark.parametrize("layer, key, value", NO_PLACE.values(), ids=NO_PLACE)
def test_export_refuses_layers_that_the_format_has_no_place_for(
    handmade_folder, tmp_path, run_here, layer, key, value
):
    """One line that names the layer, nothing written."""
    file = torch.load(handmade_folder / "quant_w8a8.pt", weights_only=True)
    state = file["layers"][layer]
    state[key] = state[key] | value if key == "weight" else value
    torch.save(file, tmp_path / "quant_w8a8.pt")
    before = snapshot(tmp_path)
    result = run_here("common/export", "--run", tmp_path, *"--wbits 8 --abits 8".split())
    refused(result, f"there is no layout yet for {layer} of method handmade")
    assert snapshot(tmp_path) == before


def test_export_refuses_a_network_that_diffusers_has_not(tmp_path, run_here):
    """Its MLP is always four times as wide; and a run that no system can name."""
    config = config_of(mlp_ratio=2.0)
    handmade_run(tmp_path, lively_dit(mlp_ratio=2.0), config)
    flags = "--wbits 8 --abits 8".split()
    refused(run_here("common/export", "--run", tmp_path, *flags), "4 times its width")
    refused(run_here("common/export", "--run", tmp_path / ("x" * 300), *flags), "too long")


def test_a_parameter_too_many_is_refused(tmp_path):
    """Which none of a DiT's official ones is."""
    state = to_diffusers(lively_dit().state_dict(), 2)
    state["transformer_blocks.0.attn1.norm_q.weight"] = torch.ones(8)
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(InputError, match="norm_q.weight is no parameter of a DiT"):
        load_dit(tmp_path / "a.bin", num_heads=3, input_size=8)


def test_a_loaded_pipeline_has_the_official_constants(diffusers, safetensors, handmade_folder):
    """Both, in every block, and nothing asks for gradients."""
    pipe, _ = loaded(diffusers, handmade_folder, "w8a8")
    for block in pipe.transformer.transformer_blocks:
        assert block.norm3.eps == 1e-6 and block.norm1.emb.time_proj.downscale_freq_shift == 0
    assert not any(x.requires_grad for x in pipe.transformer.parameters())


def test_a_file_of_something_else_does_not_go_into_a_pipeline(diffusers, safetensors, tmp_path):
    """It has no metadata of ours."""
    path = tmp_path / "a.safetensors"
    weight_files.save_safetensors(path, dict(x=torch.zeros(2)))
    with pytest.raises(InputError, match="common/export.py has not made it"):
        load_into(pipeline_of(diffusers, config_of()), path)


def pipeline_of(diffusers, config, scheduler=None):
    """A DiTPipeline with random weights, whose VAE does nothing."""
    transformer = diffusers.DiTTransformer2DModel(**diffusers_config(config)).eval()

    class NoVAE(torch.nn.Module):
        config, device = SimpleNamespace(scaling_factor=1), torch.device("cpu")

        def decode(self, z):
            self.latents = z
            return SimpleNamespace(sample=z)

    scheduler = scheduler or diffusers.DDIMScheduler()
    pipe = diffusers.DiTPipeline(transformer, NoVAE(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(diffusers, run, name):
    """(pipeline with the exported quant file, our own quantized model) of a run."""
    artifact = quant_file.load_quant(run / f"quant_{name}.pt")
    pipe = pipeline_of(diffusers, artifact["config"])
    load_into(pipe, run / f"quant_{name}.safetensors")
    return pipe, quant_file.build_quantized(artifact, run)


@pytest.mark.parametrize("name", ["w8a8", "w6a6", "w4a8_plus"])
def test_pipeline_answers_as_our_quantized_network(
    diffusers, safetensors, handmade_folder, plus_run, name
):
    """MRQ and TGQ; and of tqdit_plus time groups of inputs, SmoothQuant, quantized embedders."""
    run = handmade_folder if name == "w8a8" else plus_run
    if run == plus_run:
        exported(run, PLUS + " --tag plus" if "plus" in name else "--wbits 6 --abits 6")
    pipe, ours = loaded(diffusers, run, name)
    inputs = some_inputs(quant_file.load_quant(run / f"quant_{name}.pt")["config"])
    expected = ours(*inputs)
    assert (AsDiT(pipe.transformer)(*inputs) - expected).abs().max() < 1e-4 * expected.abs().max()
    x, t, y = inputs
    other_group = AsDiT(pipe.transformer)(x, t.flip(0), y)
    assert (other_group - ours(x, t.flip(0), y)).abs().max() < 1e-4 * other_group.abs().max()


def test_pipeline_gives_the_images_of_04(diffusers, safetensors, plus_run):
    """`trajectory` with the pipeline's transformer, from the noise of 04: its images, but for an
    input here and there that rounding puts on the other side of a code's border."""
    if not (plus_run / "quant_w6a6.safetensors").exists():
        exported(plus_run, "--wbits 6 --abits 6")
    pipe, _ = loaded(diffusers, plus_run, "w6a6")
    with np.load(plus_run / "samples_w6a6.npz") as samples:
        expected, labels = samples["arr_0"], torch.from_numpy(samples["labels"])
    generators = image_generators(0, range(len(labels)))
    *_, (_, x) = trajectory(AsDiT(pipe.transformer), Diffusion(6), labels, generators, 1.5)
    images = to_uint8(x, None).numpy()
    assert same_images(images, expected, few_differ=True) and expected.std() > 10
    assert not same_images(images[::-1], expected, few_differ=True)


class EpsAlone(torch.nn.Module):
    """A network whose learned variance is thrown away, as DiTPipeline does."""

    def __init__(self, model):
        super().__init__()
        self.model, self.in_channels = model, model.in_channels
        self.input_size, self.num_classes = model.input_size, model.num_classes

    def forward(self, x, t, y):
        return self.model(x, t, y)[:, : self.in_channels]

    def forward_with_cfg(self, *args):
        return self.model.forward_with_cfg(*args)[:, : self.in_channels]


def test_call_of_the_pipeline_is_our_sampler(diffusers, safetensors, handmade_folder):
    """pipe(...) with DDPM and four guided channels, from the same noise: within 1/255 of ours with
    a fixed variance."""
    betas = dict(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", clip_sample=False)
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", **betas)
    pipe, ours = loaded(diffusers, handmade_folder, "w8a8")
    pipe.scheduler = scheduler
    labels = [1, 207, 999]
    generators = image_generators(0, range(3))
    spare = image_generators(0, range(3), stream=9)  # of the half that the next step overwrites
    scheduler.step = functools.partial(scheduler.step, generator=generators + spare)
    how = dict(guidance_scale=1.5, num_inference_steps=6, generator=generators, output_type="pt")
    pipe(labels, **how)
    guided = torch.tensor(labels), image_generators(0, range(3)), 1.5, 4
    *_, (_, x) = trajectory(EpsAlone(ours), Diffusion(6), *guided)
    assert (pipe.vae.latents - x).abs().max() <= x.abs().max() / 255


def test_unquantized_pipeline_gives_other_answers(diffusers, safetensors, handmade_folder):
    """The check above can fail: without the groups, or the official constants, it would."""
    pipe, ours = loaded(diffusers, handmade_folder, "w8a8")
    x, t, y = some_inputs(config_of(num_classes=1000))
    expected, model = ours(x, t, y), pipe.transformer
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert (AsDiT(model)(x, t, y) - expected).abs().max() > 1e-3 * expected.abs().max()
    with_official_constants(model)
    time_group = model.transformer_blocks[0].attn1.processor.time_group
    time_group.table.zero_()
    assert (AsDiT(model)(x, t, y) - expected).abs().max() > 1e-3 * expected.abs().max()


def spoiled_files():
    """What may be wrong with an exported file: (name, function of its tensors and metadata)."""
    first, half = "transformer_blocks.0.", torch.ones(3, dtype=torch.float16)
    changes = {
        "no bias": lambda x, m: x.pop(f"{first}attn1.to_q.bias"),
        "one more": lambda x, m: x.update(other=torch.zeros(1)),
        "scale of another dtype": lambda x, m: x.update({f"{first}attn1.to_q.input_scale": half}),
        "NaN": lambda x, m: x[f"{first}attn1.to_q.weight_scale"].fill_(float("nan")),
        "negative scale": lambda x, m: x[f"{first}attn1.av.a_scale1"].neg_(),
        "too many groups": lambda x, m: x.update({f"{first}attn1.av.a_scale1": torch.ones(4)}),
        "another shape": lambda x, m: x.update(
            {f"{first}ff.net.2.weight": torch.zeros(4, 4, dtype=torch.int8)}
        ),
        "no version": lambda x, m: m.pop("version"),
        "a later version": lambda x, m: m.update(version=2),
        "77 bits": lambda x, m: m["layers"][f"{first}ff.net.2"]["weight"].update(bits=77),
        "fewer bits than codes": lambda x, m: m["layers"][f"{first}ff.net.2"]["weight"].update(
            bits=2
        ),
        "unknown layer": lambda x, m: m["layers"].update({"transformer_blocks.7.ff.net.2": {}}),
        "unknown quantizer": lambda x, m: m["layers"][f"{first}ff.net.2"]["input"].update(
            type="fp8"
        ),
        "groups that fall": lambda x, m: m.update(first_timesteps=[0, 800, 400]),
        "a million groups": lambda x, m: m["sampling"].update(groups=10**6),
        "other heads": lambda x, m: m["config"].update(num_attention_heads=4),
        "no heads": lambda x, m: m.update(config={}),
        "layers a list": lambda x, m: m.update(layers=[]),
        "a side too many": lambda x, m: m["layers"][f"{first}ff.net.2"].update(a={}),
    }
    return changes


@pytest.mark.parametrize("change", spoiled_files().values(), ids=spoiled_files())
def test_load_into_refuses_a_spoiled_file(
    diffusers, safetensors, handmade_folder, tmp_path, change
):
    """InputError that names the file; the pipeline is as it was."""
    path = tmp_path / "a.safetensors"
    tensors, metadata = weight_files.load_safetensors(
        handmade_folder / "quant_w8a8.safetensors", ""
    )
    about = json.loads(metadata["tqdit"])
    change(tensors, about)
    weight_files.save_safetensors(path, tensors, tqdit=json.dumps(about))
    pipe = pipeline_of(diffusers, config_of(num_classes=1000))
    before = copy.deepcopy(pipe.transformer.state_dict())
    with pytest.raises(InputError, match="a.safetensors does not go with this pipeline"):
        load_into(pipe, path)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("text", ["", "[]", "[" * 10**5, '{"version": 1e999}', "x" * 2**21])
def test_load_into_refuses_metadata_that_are_no_object(diffusers, safetensors, tmp_path, text):
    """Whatever the JSON text is: InputError that names the file."""
    path = tmp_path / "a.safetensors"
    weight_files.save_safetensors(path, dict(x=torch.zeros(2)), tqdit=text)
    with pytest.raises(InputError, match="a.safetensors"):
        load_into(pipeline_of(diffusers, config_of()), path)


def test_load_into_refuses_a_pipeline_it_does_not_fit(diffusers, safetensors, handmade_folder):
    """Half precision, another network, one that is quantized already; a file of something else."""
    path = handmade_folder / "quant_w8a8.safetensors"
    pipe = pipeline_of(diffusers, config_of(num_classes=1000))
    pipe.transformer.half()
    with pytest.raises(InputError, match="float32"):
        load_into(pipe, path)
    with pytest.raises(InputError, match="num_embeds_ada_norm is 1000, and 5 here"):
        load_into(pipeline_of(diffusers, config_of()), path)
    pipe, _ = loaded(diffusers, handmade_folder, "w8a8")
    with pytest.raises(InputError, match="quantized already"):
        load_into(pipe, path)


# ------------------------------------------------------------------------------------------------
# Out: the layout of compressed-tensors


def load_compressed(diffusers, folder):
    """A transformer of diffusers with a folder's weights, loaded by compressed-tensors."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = json.loads((folder / "config.json").read_text())
    told = quantization.QuantizationConfig.model_validate(config.pop("quantization_config"))
    model = diffusers.DiTTransformer2DModel.from_config(config).eval()
    quantization.apply_quantization_config(model, told)
    compressors.ModelCompressor(quantization_config=told).compress_model(model)
    weights = weight_files.load_safetensors(folder / "diffusion_pytorch_model.safetensors", "")[0]
    model.load_state_dict(weights)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.int8
    return with_official_constants(model)


def test_compressed_tensors_loads_plain_w8a8(diffusers, safetensors, plus_run, run_here):
    """Every linear layer answers as ours; so does the network, with the products as they were."""
    pytest.importorskip("compressed_tensors")
    flags = "--wbits 8 --abits 8 --tag base".split()
    base = run_here("03_quantize", "--run", plus_run, "--no-mrq", "--no-tgq", *flags)
    assert base.returncode == 0, base.stderr
    exported(plus_run, " ".join([*flags, "--layout compressed-tensors"]))
    theirs = load_compressed(diffusers, plus_run / "quant_w8a8_base_compressed")
    artifact = quant_file.load_quant(plus_run / "quant_w8a8_base.pt")
    ours = quant_file.build_quantized(artifact, plus_run)
    for block in ours.blocks:
        block.attn.qk, block.attn.av = MatMul(), MatMul()
    inputs = some_inputs(artifact["config"])
    expected, found = ours(*inputs), AsDiT(theirs)(*inputs)
    assert (found - expected).norm() < 0.01 * expected.norm()
    x = torch.randn(2, 5, 32)
    for mine, block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        parts = [getattr(block.attn1, f"to_{part}")(x) for part in "qkv"]
        torch.testing.assert_close(torch.cat(parts, dim=-1), mine.attn.qkv(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(block.ff.net[0].proj(x), mine.mlp.fc1(x), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------
# docs/interop.md


COMPRESSED = "--layout compressed-tensors --force"


def compressed(run, name):
    """The tensors and config.json of such a folder."""
    folder = run / f"quant_{name}_compressed"
    tensors = weight_files.load_safetensors(folder / "diffusion_pytorch_model.safetensors", "")[0]
    return tensors, json.loads((folder / "config.json").read_text())


def test_compressed_folder_says_what_the_quant_file_holds(safetensors, plus_run, run_here):
    """Bits, which way round; codes, scales and biases of q, k and v; the rounded convolution."""
    flags = "--wbits 6 --abits 8 --tag base".split()
    log = run_here("03_quantize", "--run", plus_run, "--no-mrq", "--no-tgq", *flags)
    assert log.returncode == 0, log.stderr
    exported(plus_run, " ".join([*flags, COMPRESSED]))
    tensors, config = compressed(plus_run, "w6a8_base")
    group = config["quantization_config"]["config_groups"]["group_0"]
    how = dict(type="int", symmetric=False, dynamic=False)
    assert group["weights"] == how | dict(num_bits=6, strategy="channel")
    assert group["input_activations"] == how | dict(num_bits=8, strategy="tensor")
    assert config["norm_eps"] == 1e-6 and len(group["targets"]) == 2 * 6 + 1
    layers = quant_file.load_quant(plus_run / "quant_w6a8_base.pt")["layers"]
    conv, qkv = layers["x_embedder.proj"], layers["blocks.1.attn.qkv"]
    whole = quant_file.unpack_weight(conv["weight"])
    assert torch.equal(tensors["pos_embed.proj.weight"], whole)
    assert torch.equal(tensors["pos_embed.proj.bias"], conv["bias"])
    for i, part in enumerate("qkv"):
        name = f"transformer_blocks.1.attn1.to_{part}."
        found = {k.removeprefix(name): x for k, x in tensors.items() if k.startswith(name)}
        codes = found["weight"].float() - found["weight_zero_point"].float()
        whole = quant_file.unpack_weight(qkv["weight"]).chunk(3)[i]
        assert torch.equal(found["weight_scale"] * codes, whole)
        assert torch.equal(found["bias"], qkv["bias"].chunk(3)[i])
        assert found["input_scale"].item() == qkv["act"]["scale"].item()
        assert found["input_zero_point"].item() == qkv["act"]["zero_point"].item() - 128


def test_compressed_folder_is_whole_where_embedders_are_quantized(
    diffusers, safetensors, plus_run, run_here
):
    """Every block has its copy."""
    flags = "--wbits 8 --abits 8 --tag all".split()
    paper = "--no-mrq --no-tgq --layers all".split()
    log = run_here("03_quantize", "--run", plus_run, *paper, *flags)
    assert log.returncode == 0, log.stderr
    exported(plus_run, " ".join([*flags, COMPRESSED]))
    tensors, config = compressed(plus_run, "w8a8_all")
    targets = config.pop("quantization_config")["config_groups"]["group_0"]["targets"]
    network = diffusers.DiTTransformer2DModel.from_config(config)
    assert network.state_dict().keys() <= tensors.keys()
    assert sum("timestep_embedder" in name for name in targets) == 2 * len(
        network.transformer_blocks
    )


def test_compressed_layout_refuses_layers_of_other_bits(safetensors, plus_run, tmp_path, run_here):
    """Or with a scale for each time group; the layer is named."""
    file = torch.load(plus_run / "quant_w6a6.pt", weights_only=True)
    static = dict(type="uniform", bits=6, scale=torch.tensor(0.1), zero_point=torch.tensor(3.0))
    for layer in file["layers"].values():
        if layer["type"] == "linear":
            layer["act"] = static
    command = f"--run {tmp_path} --wbits 6 --abits 6 {COMPRESSED}".split()
    torch.save(file, tmp_path / "quant_w6a6.pt")
    assert run_here("common/export", *command).returncode == 0
    by_group = dict(scale=torch.full((3,), 0.1), zero_point=torch.full((3,), 3.0))
    for change in (dict(bits=7), by_group):
        file["layers"]["blocks.1.mlp.fc1"]["act"] = static | change
        torch.save(file, tmp_path / "quant_w6a6.pt")
        refused(run_here("common/export", *command), "blocks.1.mlp.fc1 needs one static scale")


def as_the_docs_say(kind, x, k, delta):
    """x quantized by the formulas of docs/interop.md, with the file's tensors."""
    half = 2 ** (k - 1)
    if kind == "uniform":
        s, z = delta["scale"], delta["zero_point"].float()
        return s * ((torch.round(x / s) + z).clip(-half, half - 1) - z)
    s1, s2 = delta["scale1"], delta.get("scale2", 2.0 ** (1 - k))
    if kind == "gelu":
        low, high = torch.round(x / s1).clip(-half, 0), torch.round(x / s2).clip(0, half - 1)
        return s1 * low + s2 * high
    border = torch.clamp((half - 0.5) * s1, min=s2 / 2)
    low, high = torch.round(x / s1).clip(0, half - 1), torch.round(x / s2).clip(1, half)
    return torch.where(x >= border, s2 * high, s1 * low)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("kind", ["uniform", "softmax", "gelu"])
def test_formulas_of_the_docs_are_the_quantizers(kind, k):
    """From the exported tensors they give what the quant file's quantizer gives."""
    names = quant_file.QUANTIZERS[kind].names
    values = dict(scale=0.03, zero_point=2.0, scale1=0.002, scale2=0.04)
    quantizer = quant_file.QUANTIZERS[kind](k, *(torch.tensor(values[name]) for name in names))
    state = quant_file.quantizer_state(quantizer)
    delta = {name.removeprefix("input_"): x for name, x in delta_tensors("input", state).items()}
    x = torch.linspace(0 if kind == "softmax" else -3, 1 if kind == "softmax" else 3, 1001)
    assert torch.equal(as_the_docs_say(kind, x, k, delta), quantizer(x))


def test_script_of_the_docs_runs(diffusers, safetensors, handmade_folder, tmp_path, monkeypatch):
    """On a pipeline that was saved to disk; its second images are those of our own sampler."""
    script = (ROOT / "docs/interop.md").read_text().split("```python\n")[1].split("```")[0]
    artifact = quant_file.load_quant(handmade_folder / "quant_w8a8.pt")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=[32], latent_channels=4).eval()
    transformer = diffusers.DiTTransformer2DModel(**diffusers_config(artifact["config"]))
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    files = "pipeline", handmade_folder / "quant_w8a8.safetensors"
    monkeypatch.setattr(sys, "argv", ["sample_diffusers.py", *map(str, files)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(compile(script, "docs/interop.md", "exec"), {})
    assert len([*tmp_path.glob("pipeline_?.png")]) == 4
    labels, generators = torch.tensor([207, 360, 387, 974]), image_generators(0, range(4))
    ours = quant_file.build_quantized(artifact, handmade_folder)
    *_, (_, x) = trajectory(ours, Diffusion(6), labels, generators, 1.5)
    expected = to_uint8(vae.decode(x / vae.config.scaling_factor).sample.detach(), None)
    assert expected.float().std() > 10
    for i in range(4):
        found = np.asarray(Image.open(f"official_{i}.png")).astype(int)
        assert np.abs(found - expected[i].numpy().astype(int)).max() <= 1
