"""Write a quant file as safetensors under diffusers' names, for other programs to read.

In: RUN/quant_wXaY.pt.  Out: RUN/quant_wXaY.safetensors, which docs/interop.md specifies, and which
`load_into` of common/diffusers_pipeline.py puts into a DiTPipeline.

With --layout compressed-tensors a folder RUN/quant_wXaY_compressed instead, weights and config.json
as the package of that name reads them. It holds linear layers with one static scale for all their
inputs (`03 --no-mrq --no-tgq --tag ho`), and has no place for the quantizers of attention's two
products and of the convolution: there the products stay in full precision, the convolution's weight
is rounded.

    python common/export.py --run runs/xl --wbits 8 --abits 8
    python common/export.py --run runs/xl --wbits 8 --abits 8 --tag ho --layout compressed-tensors
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli  # noqa: E402
from common.artifacts import atomic_write, check_place, load_hashed, sha256_of  # noqa: E402
from common.diffusers_file import METADATA  # noqa: E402
from common.export_layouts import check_known, compressed_layout, tqdit_layout  # noqa: E402
from common.quant_file import load_quant  # noqa: E402
from common.weight_files import save_safetensors  # noqa: E402


def parse_args():
    p = cli.Parser(__doc__)
    p.paper.add_argument("--wbits", type=cli.whole_number, required=True, help="k of weights, 2..8")
    p.paper.add_argument(
        "--abits", type=cli.whole_number, required=True, help="k of activations, 2..8"
    )
    p.ours.add_argument("--tag", default="", help="as given to 03_quantize.py, or a method's")
    layouts = ("tqdit", "compressed-tensors")
    p.ours.add_argument("--layout", choices=layouts, default="tqdit", help="see above")
    return p.parse_args()


def write_tqdit(artifact, source, sha256, path):
    """Our layout, in one file."""
    tensors, about = tqdit_layout(artifact, source, sha256)
    save_safetensors(path, tensors, **{METADATA: json.dumps(about, sort_keys=True)})


def write_compressed(artifact, source, path):
    """That of compressed-tensors: config.json, and last the weights beside it."""
    tensors, config = compressed_layout(artifact, source)
    with atomic_write(path.parent / "config.json") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    save_safetensors(path, tensors)


def main(args):
    cli.check_bits(args, "wbits", "abits")
    cli.check_tag(args)
    source = args.run / f"quant_{cli.model_name(args)}.pt"
    path, compressed = source.with_suffix(".safetensors"), args.layout == "compressed-tensors"
    if compressed:
        folder = source.with_name(f"{source.stem}_compressed")
        path = folder / "diffusion_pytorch_model.safetensors"
    check_place(path)
    if path.exists() and not args.force:
        raise cli.InputError(f"{path} exists; --force replaces it")
    artifact, sha256 = load_hashed(source, load_quant)
    check_known(artifact, source)
    if compressed:
        write_compressed(artifact, source, path)
    else:
        write_tqdit(artifact, source, sha256, path)
    print(f"wrote {path}, {path.stat().st_size / 2**20:.2f} MiB, sha256 {sha256_of(path)[:12]}")


if __name__ == "__main__":
    cli.run_script(main, parse_args)
