"""How fast the images come: python tests/bench.py data FOLDER_OR_TAR [--workers N] [--images N].

One table: images/s from files to batches, repeated from the folder (or tar) given, RandomResizedCrop to 192 and flip,
by torchvision's PIL path and by pretrain.py's. Full-size photographs are wanted, such as some of ImageNet's.
"""

import argparse
import os
import tarfile
import tempfile
import time
from types import SimpleNamespace

import torch
from conftest import ROOT  # noqa: F401  (finds pretrain.py)
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from pretrain import ImageFiles, Images, list_images, make_loader


class PILFiles(ImageFiles):
    """The same files, as torchvision's ImageFolder reads them."""

    def __getitem__(self, i):
        with Image.open(os.path.join(self.folder, self.name(i))) as image:
            return image.convert("RGB"), 0


def images_per_second(dataset, images, workers):
    """From the second batch on: the first waits for the workers to start."""
    keys = [(i // len(dataset), i % len(dataset)) for i in range(images)]
    batches = [keys[i : i + 64] for i in range(0, images, 64)]
    loader = iter(make_loader(dataset, batches, SimpleNamespace(workers=workers), torch.device("cpu")))
    next(loader)
    started, seen = time.perf_counter(), 0
    for batch, _, _ in loader:
        seen += len(batch)
    return seen / (time.perf_counter() - started)


def bench_data(args):
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.images_in
        if os.path.isfile(folder):
            with tarfile.open(folder) as tar:
                tar.extractall(scratch, filter="data")
            folder = scratch
        names = list_images(folder)
        ours = [v2.RandomResizedCrop(192, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip()]
        rows = {"PIL (ImageFolder)": Images(PILFiles(folder, names), v2.Compose([*ours, v2.PILToTensor()])),
                "pretrain.py": Images(ImageFiles(folder, names), v2.Compose(ours))}
        speeds = {name: [] for name in rows}
        for _ in range(args.repeats):  # in turn, so that both see the same machine
            for name, dataset in rows.items():
                speeds[name].append(images_per_second(dataset, args.images, args.workers))
    print(f"{len(names)} files, {args.images} images a run, {args.workers} workers on {os.cpu_count()} cores, "
          f"median of {args.repeats}")
    for name, speed in speeds.items():
        print(f"{name:20} {sorted(speed)[len(speed) // 2]:8.0f} images/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["data"])
    parser.add_argument("images_in", metavar="FOLDER_OR_TAR")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    torch.set_num_threads(1)
    bench_data(parser.parse_args())
