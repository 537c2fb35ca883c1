"""How fast it is, a table each:

    python tests/bench.py scan                      # the scan, forward + backward, and its errors against float64
    python tests/bench.py train                     # training steps and inference, beside a ViT-B
    python tests/bench.py data FOLDER_OR_TAR        # image files to batches

scan and train need a GPU; they time ours (Triton), mamba-ssm's kernels where they are installed, and plain PyTorch, in
one run, by CUDA events, after warm-up, the median of many. data repeats the photographs of a folder (or tar): crop to
192 and flip, by torchvision's PIL path and by pretrain.py's. Full-size ones are wanted, such as some of ImageNet's.
"""

import argparse
import gc
import os
import re
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, str(Path(__file__).parent.parent))

import arm  # noqa: E402
from arm import ARM, MODELS, ARMClassifier  # noqa: E402
from pretrain import (ImageFiles, Images, list_images, make_loader, matrix_flops, matrix_rate,  # noqa: E402
                      milliseconds, optimizer_step, prepare, start_processes)


def installed_scans():
    return ["triton", *(["mamba_ssm"] if arm.mamba_ssm_installed() else []), "torch"]


# ----------------------------------------------------------------------------------------------------------------------


def scan_inputs(directions, batch, length, dim, dtype):
    """Arguments of a scan, with values as they are early in training: (tensors that need gradients, orders)."""
    def normal(*shape):
        return torch.randn(*shape, device="cuda")
    B_C, x_z = normal(directions, batch, length, 32).to(dtype), normal(batch, length, 2 * dim).to(dtype)
    A = -torch.arange(1.0, 17, device="cuda").repeat(directions, dim, 1) * (1 + 0.1 * normal(directions, dim, 16)).abs()
    tensors = [normal(directions, batch, length, dim).to(dtype), normal(directions, batch, length, dim).to(dtype),
               normal(directions, dim) - 4, A, B_C[..., :16], B_C[..., 16:], normal(directions, dim), x_z[..., dim:]]
    orders = torch.stack([torch.randperm(length, device="cuda") for _ in range(directions)])
    return [t.requires_grad_() for t in tensors], orders if directions > 1 else None


def recorded(function):
    """What function() runs on the GPU, as a CUDA graph: to be timed without the time that Python takes to launch it."""
    with torch.cuda.stream(torch.cuda.Stream()):  # once outside the graph, which compiles
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def bench_scan(args):
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; scan with step size, skip and gate\n")
    scans = {name: getattr(arm, dict(torch="selective_scan").get(name, f"{name}_scan")) for name in installed_scans()}
    print("| directions, batch, tokens, channels | dtype | scan | forward ms | forward + backward ms |")
    print("| --- " * 5 + "|")
    for shape in ((1, 256, 128, 768), (4, 128, 197, 768)):
        tensors, orders = scan_inputs(*shape, torch.bfloat16)
        dy = torch.randn(shape[1:], device="cuda", dtype=torch.bfloat16)
        for name, scan in scans.items():
            def forward():
                return scan(*tensors, orders)

            def both():
                torch.autograd.grad(forward(), tensors, dy)
            repeats = 2 if name == "torch" else 20
            times = [milliseconds(recorded(function), repeats) for function in (forward, both)]
            print(f"| {shape} | bfloat16 | {name} | {times[0]:.3f} | {times[1]:.3f} |", flush=True)
    print("\nRelative errors against float64 of the output and of the gradients (x dt dt_bias A B C D z):\n")
    print("| directions, batch, tokens, channels | dtype | scan | output | gradients |\n" + "| --- " * 5 + "|")
    for length in (1, 37, 128, 197, 577):
        for directions, dim in ((1, 104), (4, 104)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                tensors, orders = scan_inputs(directions, 3, length, dim, dtype)
                exact = [t.detach().double().requires_grad_() for t in tensors]
                dy = torch.randn(3, length, dim, device="cuda").to(dtype)
                y = arm.selective_scan(*exact, orders)
                expected = [y, *torch.autograd.grad(y, exact, dy.double())]
                for name, scan in scans.items():
                    y = scan(*tensors, orders)
                    results = [y, *torch.autograd.grad(y, tensors, dy)]
                    errors = [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
                              for a, b in zip(results, expected)]
                    print(f"| {(directions, 3, length, dim)} | {str(dtype)[6:]} | {name} | {errors[0]:.1e} | "
                          f"{' '.join(f'{e:.1e}' for e in errors[1:])} |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------


def training_step(model, optimizer, images, labels, clip_grad):
    with torch.autocast("cuda", torch.bfloat16):
        output = model(images)
    loss = output if output.ndim == 0 else F.cross_entropy(output.float(), labels)
    loss.backward()
    optimizer_step(model, optimizer, loss.detach(), clip_grad)


@torch.no_grad()
def inference(model, images):
    with torch.autocast("cuda", torch.bfloat16):
        return model(images)


def bench_train(args):
    device, rate = start_processes("cuda"), matrix_rate(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bfloat16 matrix products reach "
          f"{rate / 1e12:.0f} TFLOP/s\n")
    print("| work | model | image size, batch | by | images/s | ms | peak GiB | share of matrix rate |")
    print("| --- " * 8 + "|")
    works = [("pretrain", "arm_base", 192, 256), ("finetune", "arm_base", 224, 128),
             ("pretrain", "arm_large", 192, 128), ("pretrain", "arm_huge", 192, 64), ("classify", "arm_base", 224, 256)]
    for work, name, size, batch in works:
        if not re.search(args.only, f"{work} {name}"):
            continue
        choices = [("triton", 1)] + [("mamba_ssm", 0)] * arm.mamba_ssm_installed()  # as the released code runs them
        if name == "arm_base" and work != "classify":
            choices += [("torch", 0), ("vit_b_16", 1)]
        if name == "arm_huge":
            choices.append(("triton", 2))
        for choice, compiled in choices:
            by = {"vit_b_16": "ViT-B of torchvision", "triton": "ours", "mamba_ssm": "mamba-ssm's kernels",
                  "torch": "plain PyTorch"}[choice]
            by += ("", ", compiled", ", compiled, activation checkpointing")[compiled]
            if not re.search(args.by, by):
                continue
            torch.manual_seed(0)
            torch._dynamo.reset()
            gc.collect()  # a compiled model is part of a cycle
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            with device:
                if choice == "vit_b_16":
                    model = torchvision.models.vit_b_16(image_size=size)
                    torch._functorch.config.activation_memory_budget = 1  # as others compile it
                    model.compile()
                else:
                    os.environ["ARM_SCAN"] = choice
                    model = (ARM if work == "pretrain" else ARMClassifier)(size, **MODELS[name])
                    flops = matrix_flops(model)
                    prepare(model, SimpleNamespace(compile=compiled, accum_steps=1,
                                                   activation_checkpointing=compiled == 2))
                images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
            images, labels = images.to(device), labels.to(device)
            if work == "classify":
                model.eval()

                def step():
                    inference(model, images)
            else:
                optimizer = torch.optim.AdamW(model.parameters(), fused=True, lr=1e-4)

                def step():
                    training_step(model, optimizer, images, labels, 3.0 if work == "pretrain" else float("inf"))
            ms = milliseconds(step, 2 if choice == "torch" else 15)
            share = ""
            if choice != "vit_b_16":
                share = f"{flops * batch / (3 if work == 'classify' else 1) / ms * 1000 / rate:.0%}"
            print(f"| {work} | {name} | {size}, {batch} | {by} | {batch / ms * 1000:,.0f} | {ms:.1f} | "
                  f"{torch.cuda.max_memory_allocated() / 2**30:.1f} | {share} |", flush=True)
            model = optimizer = step = None


# ----------------------------------------------------------------------------------------------------------------------


class PILFiles(ImageFiles):
    """The same files, as torchvision's ImageFolder reads them."""

    def __getitem__(self, i):
        with Image.open(os.path.join(self.folder, self.name(i))) as image:
            return image.convert("RGB"), 0


def images_per_second(dataset, images, workers):
    """Counted once each worker has started and given a batch."""
    keys = [(i // len(dataset), i % len(dataset)) for i in range(images + 64 * workers)]
    batches = [keys[i : i + 64] for i in range(0, len(keys), 64)]
    loader = iter(make_loader(dataset, batches, SimpleNamespace(workers=workers), torch.device("cpu")))
    for _ in range(workers):
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
    tables = parser.add_subparsers(dest="table", required=True)
    tables.add_parser("scan").set_defaults(run=bench_scan)
    train = tables.add_parser("train")
    train.set_defaults(run=bench_train)
    train.add_argument("--only", default="", help="rows whose work and model match, such as 'finetune arm_base'")
    train.add_argument("--by", default="", help="rows whose 'by' matches, such as 'ours' or 'plain'")
    data = tables.add_parser("data")
    data.set_defaults(run=bench_data)
    data.add_argument("images_in", metavar="FOLDER_OR_TAR")
    data.add_argument("--workers", type=int, default=os.cpu_count())
    data.add_argument("--images", type=int, default=10000)
    data.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.table == "data":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit(f"bench.py {args.table} needs a GPU that torch can see, and there is none.")
    args.run(args)
