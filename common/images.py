"""Files of samples: uint8 images as .npz with labels and provenance, and pictures of them."""

import json
import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from common.artifacts import atomic_write, check_place, is_same_result
from common.errors import InputError
from common.schemas import check_artifact
from common.vae import VAE_SCALE


def to_uint8(x, vae):
    """(N, C, h, w) samples, decoded if latent -> (N, H, W, C) uint8."""
    if vae is not None:
        x = torch.cat([vae(z / VAE_SCALE) for z in x.split(4)])
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()


def samples_up_to_date(path, head, force):
    """True if `path` holds these very samples; InputError if it holds others, unless `force`."""
    check_place(path)
    check_place(path.with_suffix(".png"))
    if force or not path.exists():
        return False
    try:
        with np.load(path, allow_pickle=False) as old:
            meta = json.loads(str(old["meta"]))
    except MemoryError:
        raise
    except Exception as error:  # a dozen kinds: numpy's, those of its zip and of zlib, JSON's
        raise InputError(f"{path} is damaged ({error}); --force replaces it") from error
    check_artifact(meta, "samples", path, "this script")
    return is_same_result(path, meta, head)


def save_samples(path, **arrays):
    """Write the arrays, and beside them a .png of the first images."""
    save_grid(path.with_suffix(".png"), arrays["arr_0"])
    with atomic_write(path) as file:  # last: it says that all is done
        np.savez(file, **arrays)


def save_grid(path, images, columns=8):
    """A .png of the first 64 images, row by row."""
    images = images[: min(64, len(images))]
    _, height, width, channels = images.shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels).squeeze()
    with atomic_write(path) as file:
        Image.fromarray(sheet).save(file, "png")


def save_rows(path, rows, columns):
    """A .png with a row for each (label, images (N, H, W, C)): the label, and its first images."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    ends = [ruler.multiline_textbbox((4, 0), label)[2] for label, _ in rows]
    left = max(64, *(math.ceil(end) + 4 for end in ends))  # the labels' cell
    sheet = Image.new("RGB", (left + 64 * columns, 64 * len(rows)), "white")
    for i, (label, images) in enumerate(rows):
        ImageDraw.Draw(sheet).multiline_text((4, 64 * i + 18), label, fill="black")
        for j, image in enumerate(images[:columns]):
            pixels = image[:, :, 0] if image.shape[2] == 1 else image
            cell = Image.fromarray(pixels).convert("RGB").resize((62, 62))
            sheet.paste(cell, (left + 64 * j, 64 * i))
    with atomic_write(path) as file:
        sheet.save(file, "png")
