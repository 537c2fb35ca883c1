"""How fast it is, a table each:

    python tests/bench.py scan                      # the scan, forward + backward, and its errors against float64
    python tests/bench.py train                     # training steps and inference, beside a ViT-B
    python tests/bench.py data FOLDER_OR_TAR        # image files to batches
    python tests/bench.py gpus FOLDER_OR_TAR        # both scripts' training on 1, 2, 4, 8 GPUs of this machine

scan and train need a GPU; they time ours (Triton), mamba-ssm's kernels where they are installed, and plain PyTorch, in
one run, by CUDA events, after warm-up, the median of many. data and gpus repeat the photographs of a folder (or tar);
full-size ones are wanted, such as some of ImageNet's. data crops to 192 and flips, by torchvision's PIL path and by
pretrain.py's. gpus times steps alone and with images, and tells what is lost: steps without all-reduce, the time that
Python takes to launch a step, and the loader by itself.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, str(Path(__file__).parent.parent))

import arm  # noqa: E402
from arm import ARM, MODELS, ARMClassifier, ARMDetector, ARMSegmenter  # noqa: E402
from finetune import train_transform  # noqa: E402
from pretrain import (ImageFiles, Images, list_images, load, make_parser, normalize, optimizer_step,  # noqa: E402
                      parameter_groups, prepare, start_processes)


def milliseconds(function, repeats):
    """The median time from one call to the next on the GPU, after a warm-up."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 4)]
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    events[-1].synchronize()
    return sorted(start.elapsed_time(end) for start, end in zip(events[3:], events[4:]))[repeats // 2]


def matrix_rate(device):
    """What the GPU reaches in a large bfloat16 matrix product, in floating-point operations per second."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * len(a) ** 3 / milliseconds(lambda: a @ b, repeats=10) * 1000


def matrix_flops(model, size):
    """Floating-point operations of the matrix products in a training step, for one image: forward, and twice backward.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return 3 * counter.get_total_flops()


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


def training_step(model, optimizer, images, targets, clip_grad):
    """targets: classes, or what a model takes that detects or segments."""
    with torch.autocast("cuda", torch.bfloat16):
        output = model(images, targets) if hasattr(model, "pyramid") else model(images)
    loss = output if output.ndim == 0 else F.cross_entropy(output.float(), targets)
    loss.backward()
    optimizer_step(model, optimizer, 1e-4, loss.detach(), clip_grad)


def random_targets(work, batch, size):
    """What the model of `work` is trained on: eight objects in each image, the class of each pixel, or of each image.
    """
    if work == "segment":
        return torch.randint(150, (batch, size, size), dtype=torch.uint8)
    if work != "detect":
        return torch.randint(1000, (batch,))
    boxes = torch.rand(8, 2).mul(0.6 * size).repeat(1, 2).int()
    boxes[:, 2:] += torch.randint(size // 32, size * 3 // 8, (8, 2))
    masks = torch.zeros(8, size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist()):
        mask[top:bottom, left:right] = 1
    return [dict(boxes=boxes.float(), labels=torch.randint(1, 81, (8,)), masks=masks)] * batch


@torch.no_grad()
def inference(model, images):
    with torch.autocast("cuda", torch.bfloat16):
        return model(images)


def bench_train(args):
    device, rate = start_processes(SimpleNamespace(device="cuda")), matrix_rate(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bfloat16 matrix products reach "
          f"{rate / 1e12:.0f} TFLOP/s\n")
    print("| work | model | image size, batch | by | images/s | ms | peak GiB | share of matrix rate |")
    print("| --- " * 8 + "|")
    works = [("pretrain", "arm_base", 192, 256), ("finetune", "arm_base", 224, 128),
             ("pretrain", "arm_large", 192, 128), ("pretrain", "arm_huge", 192, 64), ("classify", "arm_base", 224, 256),
             ("finetune 384", "arm_base", 384, 32), ("detect", "arm_base", 1024, 8), ("segment", "arm_base", 512, 16)]
    kinds = dict(pretrain=ARM, detect=ARMDetector, segment=ARMSegmenter)
    for work, name, size, batch in works:
        if not re.search(args.only, f"{work} {name}"):
            continue
        dense = work in ("detect", "segment")
        choices = [("triton", 1)]
        if arm.mamba_ssm_installed() and not dense:
            choices.append(("mamba_ssm", 0))  # as the released code runs them
        if name == "arm_base" and work in ("pretrain", "finetune"):
            choices += [("torch", 0), ("vit_b_16", 1)]
        if name == "arm_huge" or work == "finetune 384" or dense:
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
                    model = kinds.get(work, ARMClassifier)(size, **MODELS[name])
                    flops = 0 if dense else matrix_flops(model, size)  # their heads are convolutions
                    prepare(model, SimpleNamespace(compile=compiled, accum_steps=1,
                                                   activation_checkpointing=compiled == 2))
                images, targets = torch.randn(batch, 3, size, size), random_targets(work, batch, size)
            if work == "classify":
                model.eval()

                def step():
                    inference(model, images)
            else:
                groups = [dict(params=model.parameters(), lr_scale=1.0)]
                optimizer = torch.optim.AdamW(groups, fused=True)

                def step():
                    training_step(model, optimizer, images, targets, 3.0 if work == "pretrain" else float("inf"))
            ms = milliseconds(step, 2 if choice == "torch" else 15)
            share = ""
            if choice != "vit_b_16" and not dense:
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
    loader = load(dataset, batches, workers, torch.device("cpu"))
    for _ in range(workers):
        next(loader)
    started, seen = time.perf_counter(), 0
    for batch, _, _ in loader:
        seen += len(batch)
    return seen / (time.perf_counter() - started)


@contextlib.contextmanager
def photographs(folder_or_tar):
    """The folder, or one that a tar is unpacked into."""
    with tempfile.TemporaryDirectory() as scratch:
        if os.path.isfile(folder_or_tar):
            with tarfile.open(folder_or_tar) as tar:
                tar.extractall(scratch, filter="data")
        yield scratch if os.path.isfile(folder_or_tar) else folder_or_tar


def pretraining_transform():
    return v2.Compose([v2.RandomResizedCrop(192, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC),
                       v2.RandomHorizontalFlip()])


def bench_data(args):
    with photographs(args.images_in) as folder:
        names, ours = list_images(folder), pretraining_transform()
        rows = {"PIL (ImageFolder)": Images(PILFiles(folder, names), v2.Compose([ours, v2.PILToTensor()])),
                "pretrain.py": Images(ImageFiles(folder, names), ours)}
        speeds = {name: [] for name in rows}
        for _ in range(args.repeats):  # in turn, so that both see the same machine
            for name, dataset in rows.items():
                speeds[name].append(images_per_second(dataset, args.images, args.workers))
    print(f"{len(names)} files, {args.images} images a run, {args.workers} workers on {os.cpu_count()} cores, "
          f"median of {args.repeats}")
    for name, speed in speeds.items():
        print(f"{name:20} {sorted(speed)[len(speed) // 2]:8.0f} images/s")


# ----------------------------------------------------------------------------------------------------------------------

WORKS = {  # work: its model, image size and batch on each GPU
    "pretrain arm_base": (ARM, 192, 256), "finetune arm_base": (ARMClassifier, 224, 128),
    "pretrain arm_huge": (ARM, 192, 64),
}


def bench_gpus(args):
    """A torchrun for each work and number of GPUs; one process of each prints its figures."""
    counts = [n for n in args.counts if n <= torch.cuda.device_count()]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} cores; images/s\n")
    print("| work | GPUs | steps alone | of N times one | without all-reduce | launching a step, ms | with images | "
          "of steps alone | loader by itself |\n" + "| --- " * 9 + "|")
    with photographs(args.images_in) as folder:
        for work in WORKS:
            if not re.search(args.only, work):
                continue
            for n in counts:
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
                run = subprocess.run([*torchrun, __file__, "step", folder, work], stdout=subprocess.PIPE, check=True,
                                     text=True)
                r = json.loads(run.stdout.splitlines()[-1])
                one = r["steps"] if n == counts[0] else one
                print(f"| {work} | {n} | {r['steps']:,.0f} | {r['steps'] / one * counts[0] / n:.0%} | "
                      f"{r['no_sync']:,.0f} | {r['launch_ms']:.1f} | {r['images']:,.0f} | "
                      f"{r['images'] / r['steps']:.0%} | {r['loader']:,.0f} |", flush=True)


def seconds_each(step, repeats):
    """Time of a step on all GPUs, which start together."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    dist.barrier()
    return (time.perf_counter() - started) / repeats, launched / repeats


def bench_step(args):
    """One process of bench_gpus."""
    device = start_processes(SimpleNamespace(device="cuda"))
    (kind, size, batch), processes = WORKS[args.work], dist.get_world_size()
    workers = make_parser(None).parse_args([]).workers  # as the scripts have it
    torch.manual_seed(0)
    model = kind(size, **MODELS[args.work.split()[1]]).to(device)
    prepare(model, SimpleNamespace(compile=1, accum_steps=1, activation_checkpointing=False))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), fused=True)
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)

    def step(images=images):
        training_step(ddp, optimizer, images, labels, 3.0 if kind is ARM else float("inf"))

    def step_without_all_reduce():
        with ddp.no_sync():
            step()

    augmentation = dict(image_size=size, crop_scale=0.08, augment=9, erasing=0.25)
    transform = pretraining_transform() if kind is ARM else train_transform(SimpleNamespace(**augmentation))
    dataset = Images(ImageFiles(args.images_in, list_images(args.images_in)), transform)
    endless = ([(b, (b * batch + i) % len(dataset)) for i in range(batch)] for b in itertools.count())
    alone, launching = seconds_each(step, 30)
    no_sync, _ = seconds_each(step_without_all_reduce, 30)
    batches = load(dataset, endless, workers, device)
    for _ in range(2 * workers):  # what was read ahead says nothing of the rate
        next(batches)
    loading, _ = seconds_each(lambda: next(batches), 2 * workers)

    def step_with_images():
        step(normalize(next(batches)[0], device))

    for _ in range(4 * workers):  # until as much is read ahead as there will be
        step_with_images()
    with_images, _ = seconds_each(step_with_images, 4 * workers)
    if dist.get_rank() == 0:
        print(json.dumps(dict(steps=batch * processes / alone, no_sync=batch * processes / no_sync,
                              launch_ms=1000 * launching, images=batch * processes / with_images,
                              loader=batch * processes / loading)), flush=True)
    os._exit(0)  # not waiting for workers that read on


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
    gpus = tables.add_parser("gpus")
    gpus.set_defaults(run=bench_gpus)
    gpus.add_argument("images_in", metavar="FOLDER_OR_TAR")
    gpus.add_argument("--only", default="", help="works that match, such as 'pretrain'")
    gpus.add_argument("--counts", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of GPUs")
    step = tables.add_parser("step", description="one process of gpus")
    step.set_defaults(run=bench_step)
    step.add_argument("images_in")
    step.add_argument("work", choices=WORKS)
    args = parser.parse_args()
    if args.table == "data":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit(f"bench.py {args.table} needs a GPU that torch can see, and there is none.")
    args.run(args)
