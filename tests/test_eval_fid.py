"""Tests of 05_eval_fid.py: closed forms, naive twins, and the script end to end on tiny inputs."""

import importlib.util
import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "05_eval_fid.py"
sys.path.insert(0, str(ROOT))
spec = importlib.util.spec_from_file_location("eval_fid", SCRIPT)
ev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ev)

SETTINGS = dict(name="fp", num_images=12, first=0, seed=0, steps=4, cfg_scale=1.5, cfg_channels=3)
D = 6


def rng(seed=0):
    return np.random.default_rng(seed)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    """Equal covariances: only |mu1 - mu2|^2 remains."""
    sigma, shift = np.cov(rng().normal(size=(D, 9))), rng(1).normal(size=D)
    distance = ev.frechet_distance(np.zeros(D), sigma, shift, sigma)
    assert distance == pytest.approx((shift**2).sum())


def test_frechet_distance_of_diagonal_covariances_is_the_distance_of_their_roots():
    """Commuting covariances: tr(...) = sum (sqrt(a) - sqrt(b))^2."""
    a, b = rng().uniform(0.1, 4, (2, D))
    distance = ev.frechet_distance(np.zeros(D), np.diag(a), np.zeros(D), np.diag(b))
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_moments_equal_numpy_far_from_the_origin(rows):
    """Blocks of any size give np.cov, also where a sum of squares would cancel."""
    x = torch.from_numpy(1e4 + rng().normal(size=(50, D))).float()
    mu, sigma = ev.moments(x, rows)
    np.testing.assert_allclose(mu, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.double().numpy(), rowvar=False), atol=1e-9)


def test_inception_score_counts_certain_balanced_classes():
    """1 if all predictions agree, K if K classes share evenly; splits average, a short last too."""
    assert ev.inception_score(torch.zeros(40, 5)) == pytest.approx(1)
    certain = 1000.0 * torch.eye(5).repeat_interleave(4, 0)
    assert ev.inception_score(certain) == pytest.approx(5)
    assert ev.inception_score(certain[[0, 1, 2, 3, 0, 4]], split=4) == pytest.approx(1.5)


def naive_coverage(points, centres, k=3):
    gap = np.linalg.norm
    radii = [sorted(gap(c - other) for other in centres)[k] for c in centres]
    balls = list(zip(centres, radii, strict=True))
    return np.mean([any(gap(p - c) <= radius for c, radius in balls) for p in points])


def test_coverage_equals_the_naive_loop():
    """Blocks smaller than the sets, sets of different sizes and spreads."""
    points, centres = rng().normal(size=(23, 3)) * 1.5, rng(1).normal(size=(17, 3))
    found = ev.coverage(torch.from_numpy(points), torch.from_numpy(centres), rows=5)
    assert 0 < found == naive_coverage(points, centres) < 1


def test_coverage_on_a_line_by_hand():
    """Centres 0, 1, 2, 3 have radii 3, 2, 2, 3: they reach from -3 to 6, both ends included."""
    centres = torch.arange(4.0)[:, None]
    points = torch.tensor([-3.1, -3.0, 1.5, 6.0, 6.1])[:, None].double()
    assert ev.coverage(points, centres) == 3 / 5
    assert ev.coverage(points, centres[:3]) is None  # no third neighbour


def test_psnr_of_known_errors():
    """Error 5 everywhere is 10 log10(255^2 / 25) dB; equal images count as rounding, 58.9 dB."""
    a = np.full((3, 4, 4, 1), 100, np.uint8)
    assert ev.psnr(a, a + 5) == pytest.approx(10 * np.log10(255**2 / 25))
    assert ev.psnr(a - 100, a + 155) == pytest.approx(0)  # no wrap-around of uint8
    assert ev.psnr(a, a) == pytest.approx(58.92, abs=0.01)


@pytest.mark.parametrize("size", [5, 32, 299, 320])
def test_resize_matrix_is_tensorflow_1_bilinear(size):
    """Output i mixes inputs floor(s) and floor(s) + 1, s = i * size / 299; not half-pixel."""
    line = rng().uniform(0, 255, size)
    wanted = []
    for i in range(299):
        low = min(int(i * size / 299), size - 1)
        high = min(low + 1, size - 1)
        wanted.append(line[low] + (line[high] - line[low]) * (i * size / 299 - low))
    found = ev.resize_matrix(size, 299) @ torch.from_numpy(line).float()
    np.testing.assert_allclose(found, wanted, atol=0.02)


def test_inception_uses_each_convolution_of_torchvision_once(monkeypatch):
    """94 names, the map sizes of the published network, and logits without the bias."""
    names, plain, w = [], ev.conv, {"fc.weight": torch.randn(1008, 48)}

    def conv(w, x, name):
        kernel = 3 if name.endswith(ev.UNPADDED) else 1
        w[f"{name}.conv.weight"] = torch.rand(8, x.shape[1], kernel, kernel) - 0.4
        for key in ("weight", "bias", "running_mean", "running_var"):
            w[f"{name}.bn.{key}"] = torch.ones(8)
        names.append(name)
        return plain(w, x, name)

    monkeypatch.setattr(ev, "conv", conv)
    outputs = ev.inception(w, torch.randint(0, 256, (2, 9, 9, 1)).byte())
    assert len(names) == 94
    assert sha256(" ".join(sorted(names)).encode()).hexdigest()[:16] == "90c836d27dc9b9f5"
    assert [tuple(x.shape) for x in outputs] == [(2, 6 * 8), (2, 17 * 17 * 7), (2, 1008)]
    torch.testing.assert_close(outputs[2], F.linear(outputs[0], w["fc.weight"]))


def test_spatial_features_are_flattened_rows_columns_channels(monkeypatch):
    """sFID's mu_s of ADM's files is in TensorFlow's order: the 7 channels vary fastest."""
    grid = torch.arange(8.0)[:, None, None] + 100 * torch.arange(17 * 17.0).view(17, 17)
    monkeypatch.setattr(ev, "conv", lambda w, x, name: x)
    monkeypatch.setattr(ev, "mixed", lambda w, x, name, *plan: grid[None])
    _, spatial, _ = ev.inception({"fc.weight": torch.ones(1, 8)}, torch.zeros(1, 9, 9, 3))
    assert spatial[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 100, 101]


def naive_pool(x, reduce):
    """3 x 3, stride 1, over the window's part inside the image."""
    size = range(x.shape[-1])
    window = [[x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] for j in size] for i in size]
    return torch.stack([torch.stack([reduce(w) for w in row], -1) for row in window], -2)


@pytest.mark.parametrize("name", ["5b", "6e", "7b", "7c"])
def test_inception_pools_are_those_of_the_2015_graph(name):
    """Averages leave the padding out, and the last block takes a maximum."""
    pool = next(pool for names, _, pool in ev.MIXED if name in names.split())
    x = torch.rand(2, 3, 5, 5)
    wanted = naive_pool(x, lambda w: w.amax((-2, -1)) if name == "7c" else w.mean((-2, -1)))
    torch.testing.assert_close(pool(x), wanted)


def save_samples(path, images, **changed):
    settings = SETTINGS | {"name": path.stem.removeprefix("samples_")} | changed
    meta = dict(kind="samples", format=1, settings=settings, inputs={"quant": "abc"}, model_bytes=9)
    labels = np.arange(len(images)) % 10
    np.savez(path, arr_0=images, labels=labels, meta=np.array(json.dumps(meta)))


@pytest.fixture
def run(tmp_path):
    """A run with three files of samples, a demo feature network, and its reference."""
    torch.manual_seed(0)
    net = ev.dit.FeatureNet(1, 2, 10).eval()
    torch.save(net.state_dict(), tmp_path / "features_tiny.pt")
    images = rng().integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    save_samples(tmp_path / "samples_fp.npz", images)
    save_samples(tmp_path / "samples_w8a8.npz", images ^ 1)
    save_samples(tmp_path / "samples_w6a6.npz", images // 2, seed=1)
    return tmp_path


def command(run, *flags, reference="reference.npz", features="features_tiny.pt"):
    paths = ["--run", run, "--reference", run / reference, "--features", run / features]
    return [str(word) for word in (SCRIPT, *paths, "--device", "cpu", *flags)]


def evaluate(*args, **names):
    words = [sys.executable, *command(*args, **names)]
    return subprocess.run(words, capture_output=True, text=True)


def test_script_scores_a_run_and_keeps_what_it_has(run):
    """Equal sets score 0, 1, 1; no demo number is called FID; only --force scores again."""
    out = evaluate(run)
    assert out.returncode == 0, out.stderr
    text = (run / "metrics.json").read_text()
    fp, w8a8, w6a6 = json.loads(text)["rows"]
    assert (fp["name"], w8a8["name"], w6a6["name"]) == ("fp", "w8a8", "w6a6")
    assert ev.Image.open(run / "comparison.png").size == (64 * 11, 64 * 2)  # w6a6: another seed
    assert abs(fp["FD(demo)"]) < 1e-6 and fp["precision"] == fp["recall"] == 1
    assert w6a6["FD(demo)"] > w8a8["FD(demo)"] > 0
    assert w8a8["psnr"] == pytest.approx(20 * np.log10(255)) and fp["psnr"] is None
    assert w6a6["psnr"] is None and "seed" in w6a6["note"]
    assert w8a8["inputs"] == {"quant": "abc"} and not w8a8["comparable"]
    assert not {"FID", "sFID", "IS"} & fp.keys() and "not comparable" in out.stdout
    (run / "samples_w6a6.npz").unlink()
    (run / "metrics.json").write_text(text.replace('"note": ""', '"note": "kept"'))
    again, forced = evaluate(run).stdout, evaluate(run, "--force", "--batch-size", "5").stdout
    assert "kept" in again and "kept" not in forced and "w6a6" in forced


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_read_maps_what_savez_wrote_and_checks_it(save, tmp_path):
    """The same images, mapped unless compressed; an altered row is refused."""
    images, path = rng().integers(0, 256, (20, 64, 64, 3), dtype=np.uint8), tmp_path / "a.npz"
    save(path, labels=np.arange(20), arr_0=images, arr_1=images)
    found = ev.read(path)
    assert np.array_equal(found["arr_0"], images) and found["labels"].tolist() == [*range(20)]
    assert isinstance(found["arr_0"], np.memmap) == (save is np.savez)
    path.write_bytes(path.read_bytes().replace(images[9, 3].tobytes(), images[9, 2].tobytes(), 1))
    if save is np.savez:
        with pytest.raises(ev.dit.InputError, match="CRC"):
            ev.read(path)


def test_script_takes_a_folder_and_bare_adm_samples(run):
    """The same images as png score the same; without meta the name is the file's, PSNR absent."""
    (run / "folder").mkdir()
    for i, image in enumerate(images := np.load(run / "reference.npz")["arr_0"]):
        Image.fromarray(image[..., 0]).save(run / f"folder/{i:03}.png")
    np.savez(run / "samples_theirs.npz", arr_0=images)
    out = evaluate(run, reference="folder")
    assert out.returncode == 0, out.stderr
    rows = {row["name"]: row for row in json.loads((run / "metrics.json").read_text())["rows"]}
    assert rows["theirs"]["FD(demo)"] == pytest.approx(0, abs=1e-6)
    assert rows["theirs"]["psnr"] is None


class Payload:
    def __reduce__(self):
        return pytest.fail, ("unpickled a stranger's object",)


def damage(run, case):
    path, other = run / "samples_fp.npz", np.zeros((3, 8, 8, 3), np.uint8)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif case == "pickled":
        np.savez(path, arr_0=np.array([Payload(), Payload()]))
    elif case in ("one image", "channels"):
        save_samples(path, other if case == "channels" else other[:1, :, :, :1])
    elif case == "wrong dims":
        np.savez(run / "reference.npz", mu=np.zeros(5), sigma=np.eye(5))
    elif case == "metrics":
        (run / "metrics.json").write_text('{"format": 1, "rows": [')


CASES = "truncated", "pickled", "one image", "channels", "wrong dims", "metrics"
FLAGS = {"device": ["--device", "cuda:99"], "batch": ["--batch-size", "0"]}
FLAGS |= {"no run": ["--run", "nowhere"], "no reference": ["--reference", "nowhere.npz"]}


@pytest.mark.parametrize("case", [*CASES, *FLAGS, "features"])
def test_script_refuses_bad_input_in_one_line(run, case, monkeypatch, capsys):
    """Exit status 2, one line on stderr but for progress bars, metrics.json left alone."""
    if case == "device" and torch.cuda.is_available():
        pytest.skip("has CUDA")
    damage(run, case)
    before = {path: path.read_bytes() for path in run.iterdir()}
    features = "reference.npz" if case == "features" else "features_tiny.pt"
    monkeypatch.setattr(sys, "argv", command(run, *FLAGS.get(case, ()), features=features))
    with pytest.raises(SystemExit) as stop:
        ev.dit.run_script(ev.main, ev.parse_args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "it/s]" not in line]
    assert stop.value.code == 2 and [line.split(":")[0] for line in lines] == ["05_eval_fid.py"]
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
