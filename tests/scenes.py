"""Draw scenes, several of the demonstration's shapes in an image, as a COCO folder and as an ADE20K folder:
python tests/scenes.py DIR [--images N] [--size S]. DIR/coco and DIR/ade20k then hold N images to train on and N / 8 to
evaluate on, of S x S pixels. In DIR/ade20k classes 1 to 10 are the shapes, 11 is the background (classes.txt).
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle

sys.path.insert(0, str(Path(__file__).parent.parent))
from pretrain import Drawings  # noqa: E402


def draw(size, pool, chance):
    """A scene: its pixels (size, size, 3), and of each pixel the number of the object that it is of, 0 for none; and
    the objects' classes, from 0. pool: Drawings of several sizes; they may hide each other.
    """
    background = torch.tensor([chance.randint(0, 255) for _ in range(3)])[:, None, None]
    image = (background + 8 * torch.randn(3, size, size)).clamp(0, 255).byte()
    owner, classes = torch.zeros(size, size, dtype=torch.uint8), []
    for _ in range(chance.randint(1, 6)):
        drawings = chance.choice(pool)
        i, side = chance.randrange(len(drawings)), drawings.images.shape[-1]
        top, left = chance.randint(0, size - side), chance.randint(0, size - side)
        window = (..., slice(top, top + side), slice(left, left + side))
        classes.append(drawings.labels[i].item())
        image[window] = torch.where(drawings.inside[i], drawings.images[i], image[window])
        owner[window] = owner[window].masked_fill(drawings.inside[i], len(classes))
    return image.permute(1, 2, 0).numpy(), owner.numpy(), np.array(classes)


def write(folder, coco_part, ade_part, n, size, seed):
    """Write n scenes as a part of a COCO folder and of an ADE20K folder."""
    coco, ade = folder / "coco", folder / "ade20k"
    for path in (coco / coco_part, coco / "annotations", ade / "images" / ade_part, ade / "annotations" / ade_part):
        path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    chance = random.Random(seed)
    pool = [Drawings(max(20, n), size * part // 12, seed + part) for part in (2, 3, 4, 6)]
    categories = [dict(id=3 * k + 2, name=name) for k, name in enumerate(Drawings.classes)]  # with gaps, as COCO's
    images, annotations = [], []
    for i in range(n):
        pixels, owner, classes = draw(size, pool, chance)
        name = f"{i:06}.jpg"
        images.append(dict(id=i + 1, file_name=name, height=size, width=size))
        for k, label in enumerate(classes, start=1):
            mask = owner == k
            if mask.sum() >= 20:  # else hidden behind others
                code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=i + 1, category_id=categories[label]["id"], iscrowd=0,
                    segmentation=dict(code, counts=code["counts"].decode()), area=int(mask.sum()),
                    bbox=rle.toBbox(code).tolist()))
        for path in (coco / coco_part / name, ade / "images" / ade_part / name):
            Image.fromarray(pixels).save(path, quality=95)
        labels = np.array([11, *(classes + 1)], dtype=np.uint8)[owner]
        Image.fromarray(labels).save(ade / "annotations" / ade_part / f"{i:06}.png")
    with open(coco / "annotations" / f"instances_{coco_part}.json", "w") as file:
        json.dump(dict(images=images, annotations=annotations, categories=categories), file)
    (ade / "classes.txt").write_text("\n".join([*Drawings.classes, "background"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    write(args.folder, "train2017", "training", args.images, args.size, seed=1)
    write(args.folder, "val2017", "validation", max(1, args.images // 8), args.size, seed=2)


if __name__ == "__main__":
    main()
