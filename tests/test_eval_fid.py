"""Tests of 05_eval_fid.py: closed forms, naive twins, and the script end to end on tiny inputs."""

import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from hashlib import sha256

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, leftovers, load_script, refused
from PIL import Image

from common import feature_networks, inception
from common.artifacts import FORMAT, sha256_of
from common.errors import InputError
from common.metrics import coverage, frechet_distance, inception_score, moments, psnr
from common.mnist_classifier import FeatureNet

ev = load_script("05_eval_fid")
SETTINGS = dict(name="fp", num_images=12, first=0, seed=0, steps=4, cfg_scale=1.5, cfg_channels=3)
INPUTS = dict(checkpoint="c" * 64, quant="a" * 64)
D = 6


def rng(seed=0):
    return np.random.default_rng(seed)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    """Equal covariances: only |mu1 - mu2|^2 remains."""
    sigma, shift = np.cov(rng().normal(size=(D, 9))), rng(1).normal(size=D)
    distance = frechet_distance(np.zeros(D), sigma, shift, sigma)
    assert distance == pytest.approx((shift**2).sum())


def test_frechet_distance_of_diagonal_covariances_is_the_distance_of_their_roots():
    """Commuting covariances: tr(...) = sum (sqrt(a) - sqrt(b))^2."""
    a, b = rng().uniform(0.1, 4, (2, D))
    distance = frechet_distance(np.zeros(D), np.diag(a), np.zeros(D), np.diag(b))
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_moments_equal_numpy_far_from_the_origin(rows):
    """Blocks of any size give np.cov, also where a sum of squares would cancel."""
    x = torch.from_numpy(1e4 + rng().normal(size=(50, D))).float()
    mu, sigma = moments(x, rows)
    np.testing.assert_allclose(mu, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.double().numpy(), rowvar=False), atol=1e-9)


def test_inception_score_counts_certain_balanced_classes():
    """1 if all predictions agree, K if K classes share evenly; splits average, a short last too."""
    assert inception_score(torch.zeros(40, 5)) == pytest.approx(1)
    certain = 1000.0 * torch.eye(5).repeat_interleave(4, 0)
    assert inception_score(certain) == pytest.approx(5)
    assert inception_score(certain[[0, 1, 2, 3, 0, 4]], split=4) == pytest.approx(1.5)


def naive_coverage(points, centres, k=3):
    gap = np.linalg.norm
    radii = [sorted(gap(c - other) for other in centres)[k] for c in centres]
    balls = list(zip(centres, radii, strict=True))
    return np.mean([any(gap(p - c) <= radius for c, radius in balls) for p in points])


def test_inception_score_is_of_adms_splits_of_5000():
    """By default: each split is of one class here, 1; of both together it would be 2."""
    logits = 1000.0 * torch.eye(2).repeat_interleave(5000, dim=0)
    assert inception_score(logits) == pytest.approx(1)


def test_coverage_equals_the_naive_loop():
    """Blocks smaller than the sets, sets of different sizes and spreads."""
    points, centres = rng().normal(size=(23, 3)) * 1.5, rng(1).normal(size=(17, 3))
    found = coverage(torch.from_numpy(points), torch.from_numpy(centres), rows=5)
    assert 0 < found == naive_coverage(points, centres) < 1


def test_coverage_on_a_line_by_hand():
    """Centres 0, 1, 2, 3 have radii 3, 2, 2, 3: they reach from -3 to 6, both ends included."""
    centres = torch.arange(4.0)[:, None]
    points = torch.tensor([-3.1, -3.0, 1.5, 6.0, 6.1])[:, None].double()
    assert coverage(points, centres) == 3 / 5
    assert coverage(points, centres[:3]) is None  # no third neighbour


def test_psnr_of_known_errors():
    """Error 5 everywhere is 10 log10(255^2 / 25) dB; equal images count as rounding, 58.9 dB."""
    a = np.full((3, 4, 4, 1), 100, np.uint8)
    assert psnr(a, a + 5) == pytest.approx(10 * np.log10(255**2 / 25))
    assert psnr(a - 100, a + 155) == pytest.approx(0)  # no wrap-around of uint8
    assert psnr(a, a) == pytest.approx(58.92, abs=0.01)


# ------------------------------------------------------------------------------------------------
# Inception


@pytest.mark.parametrize("size", [5, 32, 299, 320])
def test_resize_matrix_is_tensorflow_1_bilinear(size):
    """Output i mixes inputs floor(s) and floor(s) + 1, s = i * size / 299; not half-pixel."""
    line = rng().uniform(0, 255, size)
    wanted = []
    for i in range(299):
        low = min(int(i * size / 299), size - 1)
        high = min(low + 1, size - 1)
        wanted.append(line[low] + (line[high] - line[low]) * (i * size / 299 - low))
    found = inception.resize_matrix(size, 299) @ torch.from_numpy(line).float()
    np.testing.assert_allclose(found, wanted, atol=0.02)


@pytest.fixture(scope="module")
def net():
    """Inception with random weights, norms that are not the identity, and a bias one would see."""
    torch.manual_seed(0)
    net = inception.Inception().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.2, 0.4)
    net.fc.bias.fill_(1)
    return net


def test_inception_has_each_convolution_of_torchvision_once(net):
    """94 names, and the number of parameters of torchvision's network with 1,008 classes."""
    names = [name for name in net.state_dict() if name.endswith(".conv.weight")]
    names = sorted(name.removesuffix(".conv.weight") for name in names)
    assert len(names) == 94
    assert sha256(" ".join(names).encode()).hexdigest()[:16] == "90c836d27dc9b9f5"
    assert sum(p.numel() for p in net.parameters()) == 23_834_568 + 8 * (2048 + 1)


def test_inception_gives_maps_of_the_published_sizes_and_logits_without_bias(net):
    """Grey images of any size: pooled (N, 2048), spatial (N, 17 * 17 * 7), logits (N, 1008)."""
    outputs = net(torch.randint(0, 256, (1, 9, 7, 1)).byte())
    assert [tuple(x.shape) for x in outputs] == [(1, 2048), (1, 17 * 17 * 7), (1, 1008)]
    assert 1e-3 < outputs[2].std() < 1e3  # a bias of 1 would show
    torch.testing.assert_close(outputs[2], F.linear(outputs[0], net.fc.weight))


def test_spatial_features_are_flattened_rows_columns_channels(monkeypatch, net):
    """sFID's mu_s of ADM's files is in TensorFlow's order: the 7 channels vary fastest."""
    grid = torch.arange(768.0)[:, None, None] + 1000 * torch.arange(17 * 17.0).view(17, 17)
    monkeypatch.setattr(net.Mixed_6d, "forward", lambda x: grid[None])
    _, spatial, _ = net(torch.zeros(1, 9, 9, 3).byte())
    assert spatial[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 1000, 1001]


def naive_pool(x, reduce):
    """3 x 3, stride 1, over the window's part inside the image."""
    size = range(x.shape[-1])
    window = [[x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] for j in size] for i in size]
    return torch.stack([torch.stack([reduce(w) for w in row], -1) for row in window], -2)


BRANCHES = {  # by block: its input's channels, and the convolutions that its output joins
    "5b": (192, "1x1 5x5_2 3x3dbl_3 _pool"),
    "6a": (288, "3x3 3x3dbl_3"),
    "6e": (768, "1x1 7x7_3 7x7dbl_5 _pool"),
    "7a": (768, "3x3_2 7x7x3_4"),
    "7b": (1280, "1x1 3x3_2a 3x3_2b 3x3dbl_3a 3x3dbl_3b _pool"),
    "7c": (2048, "1x1 3x3_2a 3x3_2b 3x3dbl_3a 3x3dbl_3b _pool"),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_inception_blocks_join_their_branches_in_torchvisions_order(name, net):
    """The next block's weights count on it; the pool is a maximum in 6a, 7a and 7c, else an
    average that leaves the padding out."""
    channels, names = BRANCHES[name]
    block, made = net.get_submodule(f"Mixed_{name}"), {}
    convs = [block.get_submodule(f"branch{branch}") for branch in names.split()]
    hooks = [c.register_forward_hook(lambda m, _, out: made.update({m: out})) for c in convs]
    x = torch.randn(2, channels, 5, 5)
    joined = block(x)
    for hook in hooks:
        hook.remove()
    parts = [made[conv] for conv in convs]
    if "_pool" in names:
        largest = name == "7c"
        pooled = naive_pool(x, lambda w: w.amax((-2, -1)) if largest else w.mean((-2, -1)))
        parts[-1] = block.branch_pool(pooled)
    else:
        parts.append(F.max_pool2d(x, 3, stride=2))
    torch.testing.assert_close(joined, torch.cat(parts, dim=1))


def test_load_network_takes_inceptions_old_file_strictly(net, tmp_path):
    """torch's format before zip, no counters of batches; with a weight less it is refused."""
    state = {k: v.half() for k, v in net.state_dict().items() if "num_batches" not in k}
    path = tmp_path / "inception.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    network = feature_networks.load_network("inception", path, torch.device("cpu"))
    loaded = network.features.state_dict()
    assert all(loaded[key].equal(value.float()) for key, value in state.items())
    assert loaded["fc.weight"].dtype == torch.float32 and network.channels == (1, 3)
    with pytest.raises(InputError, match="Mixed_7a.branch3x3_2.bn.bias"):
        del state["Mixed_7a.branch3x3_2.bn.bias"]
        feature_networks.fill(inception.Inception, state, path)


def test_out_of_memory_is_not_called_a_misfit():
    """What a CPU raises when it has no more is one line, and gives torch's own reason."""
    device = torch.device("cpu")
    network = feature_networks.Network(lambda x: torch.empty(2**60), (1,), "net.pt", device)
    images = np.zeros((2, 8, 8, 1), np.uint8)
    with pytest.raises(InputError, match="memory.*smaller --batch-size") as caught:
        feature_networks.check_fit(network, images, "samples_fp.npz", {})
    assert "features" not in str(caught.value)


def test_other_channels_are_called_a_misfit_and_not_the_machines():
    """Before the network runs."""
    network = feature_networks.Network(pytest.fail, (1,), "net.pt", torch.device("cpu"))
    with pytest.raises(InputError, match="has images of 3 channels, net.pt takes 1"):
        feature_networks.check_fit(network, np.zeros((2, 8, 8, 3), np.uint8), "samples_fp.npz", {})


# ------------------------------------------------------------------------------------------------
# The script


def save_samples(path, images, meta=(), **changed):
    name = path.stem.removeprefix("samples_")
    settings = SETTINGS | dict(name=name, vae="none", dtype="fp32", classes=None, engine="float")
    settings |= changed
    parts = dict(kind="samples", settings=settings, inputs=INPUTS, model_bytes=9)
    labels = np.arange(len(images)) % 10
    np.savez(path, arr_0=images, labels=labels, meta=np.array(json.dumps(parts | dict(meta))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with three files of samples, a demo feature network, its reference, and metrics.json
    as the script writes it."""
    run = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    torch.save(FeatureNet(1, 2, 10).state_dict(), run / "features.pt")
    images = rng().integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(run / "reference.npz", arr_0=images)
    save_samples(run / "samples_fp.npz", images)
    save_samples(run / "samples_w8a8.npz", images ^ 1)
    save_samples(run / "samples_w6a6.npz", images // 2, seed=1)
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def evaluate(run_here):
    """evaluate(run, *flags): the script on a run with its reference and features."""

    def script(run, *flags, reference="reference.npz"):
        paths = ["--run", run, "--reference", run / reference, "--features", run / "features.pt"]
        return run_here("05_eval_fid", *paths, *flags)

    return script


def rows_of(run):
    """The rows by name, the newest of each."""
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    return {row["name"]: row for row in reversed(rows)}


def test_script_scores_a_run_and_keeps_what_it_has(run, evaluate):
    """Equal sets score 0, 1, 1; no demo number is called FID; only --force scores again."""
    out = evaluate(run)
    assert out.returncode == 0, out.stderr
    text = (run / "metrics.json").read_text()
    fp, w8a8, w6a6 = json.loads(text)["rows"]
    assert (fp["name"], w8a8["name"], w6a6["name"]) == ("fp", "w8a8", "w6a6")
    assert Image.open(run / "comparison.png").size == (64 * 11, 64 * 2)  # w6a6: another seed
    assert abs(fp["FD(demo)"]) < 1e-6 and fp["precision"] == fp["recall"] == 1
    assert w6a6["FD(demo)"] > w8a8["FD(demo)"] > 0
    assert w8a8["psnr"] == pytest.approx(20 * np.log10(255)) and fp["psnr"] is None
    assert w6a6["psnr"] is None and "seed" in w6a6["note"]
    assert w8a8["inputs"] == INPUTS
    assert not {"FID", "sFID", "IS"} & fp.keys() and "not comparable" in out.stdout
    (run / "samples_w6a6.npz").unlink()
    (run / "metrics.json").write_text(text.replace('"note": ""', '"note": "kept"'))
    again, forced = evaluate(run).stdout, evaluate(run, "--force", "--batch-size", "5").stdout
    assert "kept" in again and "kept" not in forced and "w6a6" in forced


def test_script_reads_what_savez_compressed_wrote(run, evaluate):
    """The same images give the same scores, whether the .npz is compressed or not."""
    evaluate(run)
    before = rows_of(run)["w8a8"]
    with np.load(run / "samples_w8a8.npz") as file:
        np.savez_compressed(run / "samples_w8a8.npz", arr_1=np.zeros(3), **file)
    assert evaluate(run).returncode == 0
    scores = "FD(demo)", "sFD(demo)", "IS(demo)", "precision", "recall", "psnr"
    assert ev.pick(rows_of(run)["w8a8"], scores) == ev.pick(before, scores)


def test_script_takes_a_folder_and_bare_adm_samples(run, evaluate):
    """The same images as png score the same; without meta the name is the file's, PSNR absent."""
    (run / "folder").mkdir()
    for i, image in enumerate(images := np.load(run / "reference.npz")["arr_0"]):
        Image.fromarray(image[..., 0]).save(run / f"folder/{i:03}.png")
    np.savez(run / "samples_theirs.npz", arr_0=images)
    out = evaluate(run, reference="folder")
    assert out.returncode == 0, out.stderr
    theirs = rows_of(run)["theirs"]
    assert theirs["FD(demo)"] == pytest.approx(0, abs=1e-6)
    assert theirs["psnr"] is None and "steps" in theirs["not_comparable"]


def test_statistics_of_a_reference_win_over_its_images(run, evaluate):
    """A mean moved by one adds D to the distance of equal sets; precision is still its images'."""
    evaluate(run)
    before = rows_of(run)["fp"]
    network = feature_networks.load_network(str(run / "features.pt"), None, torch.device("cpu"))
    images = np.load(run / "reference.npz")["arr_0"]
    mu, sigma = moments(feature_networks.run_network(network, images, "")[0])
    np.savez(run / "reference.npz", arr_0=images, mu=mu + 1, sigma=sigma)
    assert evaluate(run).returncode == 0
    after = rows_of(run)["fp"]
    assert after["FD(demo)"] == pytest.approx(before["FD(demo)"] + len(mu), abs=1e-4)
    assert after["precision"] == 1 and after["sFD(demo)"] == before["sFD(demo)"]


def test_comparison_shows_only_images_that_were_scored(run, evaluate):
    """A file that another run of 04 has replaced keeps its old row; the picture shows the new."""
    evaluate(run)
    images = np.load(run / "samples_w8a8.npz")["arr_0"]
    save_samples(run / "samples_w8a8.npz", images, seed=1)
    assert evaluate(run).returncode == 0
    assert len(json.loads((run / "metrics.json").read_text())["rows"]) == 4
    assert Image.open(run / "comparison.png").size == (64 * 11, 64)  # none pairs up with fp now


METHODS = (
    "fp", "w8a8", "w8a8_htg", "w6a6", "w4a8", "w4a8_ptq4dit", "w4a8_qdiffusion_r1", "w4a8_tcaqdm",
    "w4a4_ditas",
)  # fmt: skip


def test_all_methods_of_a_run_stand_side_by_side(run, evaluate):
    """Ordered by bits, then 03's before the methods by name, whose digits are no bits, also where
    metrics.json was not; no name runs into its numbers, in the table, or its images."""
    images = np.load(run / "samples_fp.npz")["arr_0"]
    for name in METHODS[:0:-1]:
        save_samples(run / f"samples_{name}.npz", images ^ 1)
    out = evaluate(run)
    assert out.returncode == 0, out.stderr
    rows = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(rows | dict(rows=rows["rows"][::-1])))
    for lines in (out.stdout.splitlines(), evaluate(run).stdout.splitlines()):
        table = lines[1 : 2 + len(METHODS)]
        assert [line.split()[0] for line in table] == ["name", *METHODS]
        assert len({re.search(r" 12(?= )| num_images", line).end() for line in table}) == 1
    sheet = np.array(Image.open(run / "comparison.png").convert("L"))
    left = sheet.shape[1] - 64 * 10
    assert sheet.shape[0] == 64 * len(METHODS) and left > 64
    first = Image.fromarray(images[0, :, :, 0]).resize((62, 62))
    assert np.array_equal(sheet[:62, left : left + 62], np.array(first))
    labels = (sheet[:, :left] < 128).reshape(len(METHODS), 64, left)
    assert labels.any((1, 2)).all() and not labels[:, :, -3:].any() and not labels[:, -3:].any()
    lines_of_text = [np.diff(ink.any(1).astype(int)).clip(0).sum() for ink in labels]
    assert lines_of_text == [1 + ("_" in name) for name in METHODS]


def test_images_of_another_size_do_not_pair_up(run, evaluate, monkeypatch):
    """PSNR is absent and says why, where features alone would not tell."""

    def means(x):
        return x.float().mean((1, 2)), x.float().mean((1, 2)), torch.zeros(len(x), 2)

    network = feature_networks.Network(means, (1, 3), run / "features.pt", torch.device("cpu"))
    monkeypatch.setattr(ev, "load_network", lambda *names: network)
    save_samples(run / "samples_w8a8.npz", np.zeros((12, 10, 10, 1), np.uint8))
    assert evaluate(run).returncode == 0
    assert rows_of(run)["w8a8"]["psnr"] is None and "size" in rows_of(run)["w8a8"]["note"]


def test_precision_is_of_the_samples_and_recall_of_the_reference(run, evaluate):
    """Paler images than the reference's, by the naive loop."""
    images = rng(5).integers(100, 156, (12, 8, 8, 1), dtype=np.uint8)
    save_samples(run / "samples_w8a8.npz", images)
    assert evaluate(run).returncode == 0
    network = feature_networks.load_network(str(run / "features.pt"), None, torch.device("cpu"))
    both = images, np.load(run / "reference.npz")["arr_0"]
    ours, real = (feature_networks.run_network(network, x, "")[0].numpy() for x in both)
    row, expected = rows_of(run)["w8a8"], (naive_coverage(ours, real), naive_coverage(real, ours))
    assert (row["precision"], row["recall"]) == expected and expected[0] != expected[1]


def test_inception_score_is_that_of_the_logits(run, evaluate, monkeypatch):
    """Certain of three classes that share the images evenly: 3."""

    def outputs(x):
        means = x.float().mean((1, 2))
        return means, means, 1000.0 * F.one_hot(torch.arange(len(x)) % 3, 3)

    network = feature_networks.Network(outputs, (1,), run / "features.pt", torch.device("cpu"))
    monkeypatch.setattr(ev, "load_network", lambda *names: network)
    assert evaluate(run).returncode == 0
    assert rows_of(run)["w8a8"]["IS(demo)"] == pytest.approx(3)


def test_new_full_precision_images_give_new_psnr(run, evaluate):
    """A row depends on the samples_fp.npz that it was held against."""
    evaluate(run)
    before = rows_of(run)["w8a8"]["psnr"]
    save_samples(run / "samples_fp.npz", np.load(run / "samples_fp.npz")["arr_0"] ^ 2)
    assert evaluate(run).returncode == 0 and rows_of(run)["w8a8"]["psnr"] < before - 1


def test_images_of_other_labels_do_not_pair_up(run, evaluate):
    """The same seeds under other classes: PSNR is absent and says why."""
    change(run / "samples_w8a8.npz", labels=np.zeros(12, int))
    assert evaluate(run).returncode == 0
    row = rows_of(run)["w8a8"]
    assert row["psnr"] is None and "labels" in row["note"]


def test_a_second_run_waits_for_the_first(run):
    """Two at a time, each with a reference of its own: nobody's rows are lost."""
    np.savez(run / "other.npz", arr_0=np.load(run / "reference.npz")["arr_0"] ^ 3)
    flags = "--run", run, "--features", run / "features.pt", "--reference"
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    command = [sys.executable, ROOT / "05_eval_fid.py", *flags]
    both = [
        subprocess.Popen([*command, run / name], stdout=subprocess.PIPE, text=True)
        for name in ("reference.npz", "other.npz")
    ]
    for process in both:
        assert "another run is at work" in process.stdout.readline()
    os.close(handle)
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert len(rows) == 6 and not leftovers(run)


def test_a_renamed_file_is_named_as_it_is(run, evaluate):
    """Two engines' images of one model stand side by side once one of the files has a new name."""
    images = np.load(run / "reference.npz")["arr_0"]
    save_samples(run / "samples_w8a8_int8.npz", images ^ 1, name="w8a8", engine="int8")
    assert evaluate(run).returncode == 0
    rows = rows_of(run)
    assert rows["w8a8"]["file"] == "samples_w8a8.npz"
    assert rows["w8a8_int8"]["file"] == "samples_w8a8_int8.npz"
    assert Image.open(run / "comparison.png").size == (64 * 11, 64 * 3)


def test_samples_replaced_while_others_are_scored_are_refused(run, evaluate, monkeypatch):
    """Their row would name the file that is gone."""
    real = ev.extract

    def extract(network, images, head, *how):
        if head["file"] == "samples_fp.npz":
            shutil.copy(run / "samples_w6a6.npz", run / "samples_w8a8.npz")
        return real(network, images, head, *how)

    monkeypatch.setattr(ev, "extract", extract)
    refused(evaluate(run), "samples_w8a8.npz was replaced meanwhile")
    monkeypatch.undo()
    assert evaluate(run).returncode == 0 and not leftovers(run)


def test_nothing_temporary_is_left(run, evaluate):
    """No folder of features stays behind."""
    assert evaluate(run).returncode == 0 and not leftovers(run)


OTHERWISE = dict(first=12, steps=5, cfg_scale=4.0, cfg_channels=1, vae="mse")


@pytest.mark.parametrize("key", OTHERWISE)
def test_images_sampled_otherwise_do_not_pair_up(key, run, evaluate):
    """No PSNR where full precision was sampled with another setting; the note names it."""
    images = np.load(run / "samples_w8a8.npz")["arr_0"]
    save_samples(run / "samples_w8a8.npz", images, **{key: OTHERWISE[key]})
    assert evaluate(run).returncode == 0
    row = rows_of(run)["w8a8"]
    assert row["psnr"] is None and f"no PSNR: {key} not as in" in row["note"]


@pytest.mark.parametrize("key", ["checkpoint", "vae"])
def test_images_of_another_network_do_not_pair_up(key, run, evaluate):
    """PSNR is absent where full precision was of another checkpoint or VAE, and says so."""
    for name, digest in ("fp", "b" * 64), ("w8a8", "c" * 64):
        images = np.load(run / f"samples_{name}.npz")["arr_0"]
        save_samples(run / f"samples_{name}.npz", images, dict(inputs=INPUTS | {key: digest}))
    assert evaluate(run).returncode == 0
    row = rows_of(run)["w8a8"]
    assert row["psnr"] is None and f"{key}'s file" in row["note"]


PAPERS = dict(num_images=10_000, size=(256, 256), steps=250, cfg_scale=1.5, cfg_channels=3)
PAPERS |= dict(vae="mse", dtype="fp32", engine="float")


def test_unlike_paper_names_what_differs_from_tables_1_and_2():
    """T is 250 or 100, N is 10,000, 256 px, guidance 1.5; what a bare file does not say differs.
    So do labels that are not all classes in turn."""
    assert ev.unlike_paper(PAPERS) == ev.unlike_paper(PAPERS | dict(steps=100)) == []
    assert ev.unlike_paper(PAPERS | dict(classes=[207])) == ["classes"]
    assert ev.unlike_paper(PAPERS | dict(engine="int8")) == []  # the same codes
    others = dict(num_images=50_000, size=(512, 512), steps=50, cfg_scale=4.0, cfg_channels=4)
    for key, value in (others | dict(vae="ema", dtype="bf16", engine="int8-folded")).items():
        assert ev.unlike_paper(PAPERS | {key: value}) == [key]
        assert ev.unlike_paper(PAPERS | {key: None}) == [key]


def test_describe_asks_for_adms_reference_and_the_features_of_2015(run, monkeypatch):
    """Its name and its own statistics, pooled and spatial; Inception's file by its sha256."""
    device = torch.device("cpu")
    network = feature_networks.load_network(str(run / "features.pt"), None, device)
    source = (run / "reference.npz").rename(run / "VIRTUAL_imagenet256_labeled.npz")
    published = dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s"))

    def differ(source=source, **reference):
        return ev.describe(source, reference, network, True)["not_comparable"]

    assert differ(**published) == ["features"]
    monkeypatch.setattr(ev, "INCEPTION_SHA", sha256_of(run / "features.pt")[:8])
    assert differ(**published) == [] and differ(run / "samples_fp.npz", **published) != []
    assert differ(arr_0=None) == differ(mu=None, sigma=None) == ["reference"]


def test_table_says_what_keeps_a_row_from_comparing(run, evaluate, capsys):
    """By name, in the row; nothing where nothing differs."""
    evaluate(run)
    row = rows_of(run)["fp"] | dict(FID=1.0, sFID=2.0, IS=3.0, feature_space="inception")
    ev.print_table([row | dict(name="ours"), row | dict(name="theirs", not_comparable=[])])
    _, _, ours, theirs = capsys.readouterr().out.splitlines()
    assert (
        ours.endswith("features, reference, num_images, size, steps, vae") and "not" not in theirs
    )


# ------------------------------------------------------------------------------------------------
# Bad input: generators of (name, mutation) for each file that the script reads


class Payload:
    def __reduce__(self):
        return pytest.fail, ("unpickled a stranger's object",)


IMAGES = np.zeros((12, 8, 8, 1), np.uint8)
BAD_IMAGES = {
    "of floats": IMAGES.astype(float),
    "pickled": np.array([Payload()] * 12),
    "text": np.array("images"),
    "no channels": IMAGES[..., 0],
    "none": IMAGES[:0],
    "one": IMAGES[:1],
    "no height": IMAGES[:, :0],
    "two channels": IMAGES.repeat(2, 3),
    "in color": IMAGES.repeat(3, 3),  # this network was trained on grey ones
    "of another size": IMAGES.repeat(2, 1),
}
BAD_LABELS = dict(more=np.arange(13), floats=np.ones(12), table=np.ones((12, 1), int))
BAD_META = {
    "no JSON": "{",
    "a list": "[]",
    "null": "null",
    "a number": "1e400",
    "deep": "[" * 100_000,
    "deep settings": '{"settings":' * 500 + "1" + "}" * 500,
    "floats": [0.5, 0.5],
}
BAD_NUMBERS = None, {}, True, "1", 2**63, math.nan, math.inf
STATISTICS = dict(mu=np.zeros(8), sigma=np.eye(8), mu_s=np.zeros(28), sigma_s=np.eye(28))
BAD_STATISTICS = {
    "mu of another length": dict(mu=np.zeros(7), sigma=np.eye(7)),
    "mu_s of another length": dict(mu_s=np.zeros(7), sigma_s=np.eye(7)),
    "mu 0-d": dict(mu=np.array(0.0)),
    "mu 2-d": dict(mu=np.zeros((8, 1))),
    "mu integers": dict(mu=np.zeros(8, int)),
    "mu pickled": dict(mu=np.array([Payload()] * 8)),
    "mu NaN": dict(mu=np.full(8, np.nan)),
    "sigma not square": dict(sigma=np.eye(8)[:7]),
    "sigma of another size": dict(sigma=np.eye(9)),
    "sigma infinite": dict(sigma=np.full((8, 8), np.inf)),
    "sigma huge": dict(sigma=np.eye(8) * 1e200),
    "sigma complex": dict(sigma=np.eye(8) * 1j),
    "sigma_s NaN": dict(sigma_s=np.eye(28) * np.nan),
    "features of another width": dict(features=np.zeros((9, 7))),
    "features 1-d": dict(features=np.zeros(8)),
    "features NaN": dict(features=np.full((9, 8), np.nan)),
}


def change(path, drop=(), **arrays):
    """Put these arrays into an .npz."""
    with np.load(path) as file:
        kept = {key: file[key] for key in file if key not in drop}
    np.savez(path, **kept | arrays)


def change_settings(path, drop=(), **settings):
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
    kept = {key: value for key, value in meta["settings"].items() if key not in drop}
    change(path, meta=np.array(json.dumps(meta | dict(settings=kept | settings))))


def bad_files(path):
    """What is no .npz, or not a whole one."""
    whole = path.read_bytes()
    at = whole.index(b"arr_0.npy") + 600  # amid the images
    flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    longer = whole.replace(b"(12, 8, 8, 1)", b"(12, 8, 9, 1)", 1)
    huge = whole.replace(b"(12, 8, 8, 1)", b"(12, 1" + b"0" * 6 + b")", 1)
    contents = {"cut off": whole[:300], "empty": b"", "noise": rng().bytes(999)}
    contents |= {"a flipped bit": flipped, "longer": longer, "another shape": huge}
    for name, content in contents.items():
        yield name, partial(path.write_bytes, content)
    yield "torch's", partial(torch.save, {"arr_0": torch.zeros(2)}, path)
    yield "a pipe", lambda: (path.unlink(), os.mkfifo(path))
    yield "a folder", lambda: (path.unlink(), path.mkdir(), (path / "a.txt").touch())


def bad_samples(run):
    path = run / "samples_w6a6.npz"
    yield from bad_files(path)
    yield "no images", partial(change, path, ["arr_0"])
    for name, images in BAD_IMAGES.items():
        yield f"images {name}", partial(change, path, ["labels", "meta"], arr_0=images)
    for name, labels in BAD_LABELS.items():
        yield f"labels {name}", partial(change, path, labels=labels)
    for name, meta in BAD_META.items():
        yield f"meta {name}", partial(change, path, meta=np.array(meta))
    for key in ("settings", "model_bytes"):
        for value in (None, "x", 2.5, -1):
            yield f"meta {key} {value}", partial(save_samples, path, IMAGES, {key: value})
    for key in SETTINGS:
        yield f"no {key}", partial(change_settings, path, [key])
        yield f"{key} a list", partial(change_settings, path, **{key: []})
    for key, values in dict(name=(7, "x" * 5000), seed=BAD_NUMBERS, cfg_scale=BAD_NUMBERS).items():
        for value in values:
            yield f"{key} {value}", partial(change_settings, path, **{key: value})
    yield "num_images 13", partial(change_settings, path, num_images=13)


def bad_references(run):
    path = run / "reference.npz"

    def folder(*sizes):
        path.unlink()
        path.mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", size).save(path / f"{i}.png")

    def half_an_image():
        folder((8, 8), (8, 8))
        (path / "1.png").write_bytes((path / "1.png").read_bytes()[:40])

    def two_deep_images():
        folder((8, 8), (8, 8))
        for file in path.iterdir():
            Image.new("I;16", (8, 8), 40_000).save(file)

    yield from bad_files(path)
    yield "not there", path.unlink
    yield "one image", partial(folder, (8, 8))
    yield "16 bits a channel", two_deep_images
    yield "images of two sizes", partial(folder, (8, 8), (8, 9))
    yield "half an image", half_an_image
    yield "neither images nor statistics", partial(np.savez, path, labels=IMAGES)
    for name, images in BAD_IMAGES.items():
        yield f"images {name}", partial(change, path, arr_0=images)
    for name, arrays in BAD_STATISTICS.items():
        yield name, partial(np.savez, path, **STATISTICS | arrays)
    for key in STATISTICS:
        others = {name: array for name, array in STATISTICS.items() if name != key}
        yield f"no {key}", partial(np.savez, path, **others)
    yield "features of images", partial(change, path, features=np.zeros((9, 8)))


def bad_metrics(run):
    path = run / "metrics.json"
    good = json.loads(path.read_text())
    first, row, *_ = good["rows"]

    def put(metrics):
        return partial(path.write_text, json.dumps(metrics))

    yield "cut off", partial(path.write_text, '{"format": 2, "rows": [')
    yield "no text", partial(path.write_bytes, b"\xff\xfe")
    yield "deep", partial(path.write_text, "[" * 100_000)
    yield "a pipe", lambda: (path.unlink(), os.mkfifo(path))
    yield "a folder", lambda: (path.unlink(), path.mkdir(), (path / "a.txt").touch())
    for name, metrics in {"a list": [], "empty": {}, "no rows": dict(format=FORMAT)}.items():
        yield name, put(metrics)
    for other in (FORMAT - 1, str(FORMAT), None):
        yield f"format {other}", put(good | dict(format=other))
    for rows in ({}, "rows", [[]], [None], [first, row | dict(color="red")]):
        yield f"rows {rows}", put(good | dict(rows=rows))
    for key, value in row.items():
        others = {name: x for name, x in row.items() if name != key}
        yield f"row without {key}", put(good | dict(rows=[first, others]))
        bad = [7, "x" * 5000] if isinstance(value, str) else ["7", 2**63, math.nan, True]
        if isinstance(value, dict | list):
            bad = [[[[[[[[[[[[]]]]]]]]]]]]
        for x in bad:
            yield f"row {key} {x}", put(good | dict(rows=[first, row | {key: x}]))


def bad_features(run):
    path = run / "features.pt"
    state = torch.load(path, weights_only=True)
    good = {key: value for key, value in state.items() if "num_batches" not in key}
    for name, content in {
        "a list": [1, 2],
        "a tensor": torch.zeros(3),
        "of texts": dict.fromkeys(good, "x"),
        "pickled": {"convs.0.weight": Payload()},
        "of color images": FeatureNet(3, 2, 10).state_dict(),
        "whole numbers": {key: value.long() for key, value in good.items()},
    }.items():
        yield name, partial(torch.save, content, path)
    yield "cut off", partial(path.write_bytes, path.read_bytes()[:300])
    yield "an .npz", partial(shutil.copy, run / "reference.npz", path)
    yield "not there", path.unlink
    yield "a folder", lambda: (path.unlink(), path.mkdir())
    for key in ("convs.0.weight", "norms.3.running_var", "fc.weight", "fc.bias"):
        value, others = good[key], {name: x for name, x in good.items() if name != key}
        yield f"no {key}", partial(torch.save, others, path)
        for name, bad in {
            "0-d": torch.tensor(0.5),
            "longer": torch.zeros(99, *value.shape[1:]),
            "NaN": torch.full(value.shape, math.nan),
            "complex": value * 1j,
            "on meta": value.to("meta"),
        }.items():
            yield f"{key} {name}", partial(torch.save, good | {key: bad}, path)


def snapshot(run):
    return {path: path.is_file() and path.read_bytes() for path in run.rglob("*")}


def is_refused(result, run, before):
    """Status 2, one line on stderr, and nothing written."""
    lines = result.stderr.splitlines()
    said = len(lines) == 1 and lines[0].startswith("05_eval_fid.py: ") and len(lines[0]) < 600
    return result.returncode == 2 and said and snapshot(run) == before


@pytest.mark.parametrize("mutants", [bad_samples, bad_references, bad_metrics, bad_features])
def test_script_refuses_bad_files_in_one_line(mutants, finished, tmp_path, evaluate):
    """Exit status 2, one line on stderr, metrics.json left alone: whatever is wrong with a file."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert evaluate(run).returncode == 0
    good = shutil.copytree(run, tmp_path / "good")
    faults = []
    for name, mutate in mutants(run):
        mutate()
        before = snapshot(run)
        result = evaluate(run)
        if not is_refused(result, run, before):
            faults.append(f"{name}: {result.returncode} {result.stderr}")
        shutil.rmtree(run)
        shutil.copytree(good, run)
    assert not faults


FLAGS = {"device": ["--device", "cuda:99"], "batch": ["--batch-size", "0"]}
FLAGS |= {"beyond 64 bits": ["--batch-size", str(2**63)], "device tpu": ["--device", "tpu"]}
FLAGS |= {"no run": ["--run", "nowhere"], "no reference": ["--reference", "nowhere.npz"]}
FLAGS |= {"two networks": ["--inception", "nowhere.pth"]}
FLAGS |= {"Inception": ["--features", "inception", "--inception", "nowhere.pth"]}


@pytest.mark.parametrize("case", FLAGS)
def test_script_refuses_bad_flags_in_one_line(case, run, evaluate):
    """Exit status 2, one line on stderr, nothing written."""
    if case == "device" and torch.cuda.is_available():
        pytest.skip("has CUDA")
    before = snapshot(run)
    assert is_refused(evaluate(run, *FLAGS[case]), run, before)
