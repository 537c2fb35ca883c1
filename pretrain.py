"""Pretrain ARM by predicting the next cluster of an image (section 3.2; recipe: appendix of the ARM paper).

    torchrun --standalone --nproc_per_node 1 pretrain.py                     # demonstration, a few minutes on a CPU
    torchrun --nproc_per_node 8 pretrain.py --data /data/imagenet            # the paper's ARM-B
    torchrun --nproc_per_node 8 pretrain.py --data /data/imagenet --model arm_large

The defaults are the paper's recipe. A run goes to --out (last.pth, log.jsonl, predictions.png); the same command
continues it. Every random choice is a function of seed, epoch and sample alone: neither the number of processes or
workers nor an interruption changes what is computed.
"""

import argparse
import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from arm import ARM, MODELS, kernels, read_checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
RECIPES = {  # where the paper's recipe differs between models
    "arm_large": dict(batch_size=1024),
    "arm_huge": dict(batch_size=512, epochs=800),
}
MAY_CHANGE = ("data", "out", "resume", "eval", "workers", "device", "accum_steps", "checkpoint_minutes", "compile",
              "activation_checkpointing")  # on resuming
DEMONSTRATION = dict(model="arm_tiny", image_size=48, patch_size=8, cluster_size=2, epochs=8, warmup_epochs=1,
                     batch_size=64, blr=8e-3, workers=0, compile=0, drawings=3200,
                     out="runs/demo_pretrain")


# ----------------------------------------------------------------------------------------------------------------------
# Processes, and how they end


class Stop(Exception):
    """Ends the run with one sentence and an exit code: 2 bad input, 75 (EX_TEMPFAIL) interrupted, 1 anything else.

    everywhere: it is raised on every process alike, so only the first one says it.
    """

    def __init__(self, sentence, code=1, everywhere=True):
        super().__init__(sentence)
        self.code, self.everywhere = code, everywhere


@contextlib.contextmanager
def bad_input():
    """A ValueError in here is the user's to mend: its one sentence, exit code 2."""
    try:
        yield
    except ValueError as error:
        raise Stop(str(error), code=2) from None


class Parser(argparse.ArgumentParser):
    """argparse, with defaults in its help and errors of one sentence."""

    def __init__(self, description):
        super().__init__(description=description, epilog="These defaults are arm_base's; the demonstration and other "
                                                         "models have some of their own.")

    def add_argument(self, *names, help, **options):
        if options.get("default") not in (None, argparse.SUPPRESS):
            help += " (default: %(default)s)"
        return super().add_argument(*names, help=help, **options)

    def error(self, message):
        raise Stop(f"{message[0].upper()}{message[1:]}. Run python {self.prog} --help for what there is.", code=2)


def process():
    """(rank, number of processes) as torchrun gives them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def explain(error):
    """What ends the run, as a Stop: one sentence for what a user can act on, else the traceback."""
    text = str(error)
    first_line = text.partition("\n")[0][:100]
    if isinstance(error, Stop):
        return error
    if isinstance(error, KeyboardInterrupt):  # while it trains, Progress catches the signal
        return Stop("Interrupted.", code=os.EX_TEMPFAIL)
    if isinstance(error, torch.OutOfMemoryError):
        return Stop("Out of GPU memory: use a larger --accum_steps, which splits the batch in time, or "
                    "--activation_checkpointing.", everywhere=False)
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Cannot allocate memory", text):
        return Stop("Out of memory: use fewer --workers, or a larger --accum_steps.", everywhere=False)
    if isinstance(error, (ConnectionError, EOFError)) or text.startswith("DataLoader worker"):  # its pipe, or its end
        return Stop("A data loader worker died, often for want of memory: try fewer --workers.", everywhere=False)
    if isinstance(error, OSError):
        return Stop(f"{error.filename or 'A file'}: {error.strerror or error}.", everywhere=False)
    if isinstance(error, dist.DistError) or re.search("onnection|imed out|gloo|NCCL", first_line):
        return Stop(f"Lost the connection to another process, which ended or hangs ({first_line}).", everywhere=False)
    return Stop("".join(traceback.format_exception(error)), everywhere=False)


def run(main):
    """Call main(); whatever stops it ends every process with a message and a non-zero exit, without a hang."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        end, (rank, _) = explain(error), process()
        if rank == 0 or not end.everywhere:
            print(f"\n{end}" if rank == 0 else f"\nProcess {rank}: {end}", file=sys.stderr)
        else:
            time.sleep(3)  # torchrun ends all processes as soon as one ends: let the first one speak
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)  # not sys.exit, which would wait for processes that are gone and workers that do not end
    dist.destroy_process_group()


def start_processes(device):
    """Join the process group (NCCL on GPUs, gloo on CPUs). Returns this process's torch.device."""
    with bad_input():
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU that torch can see, and there is none: use --device cpu.")
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device == "cuda" and local_processes > torch.cuda.device_count():
            raise ValueError(f"There are {local_processes} processes for {torch.cuda.device_count()} GPUs: give "
                             f"torchrun --nproc_per_node {torch.cuda.device_count()}.")
        kernels(torch.device(device))  # ARM_SCAN may ask for what is not there
    device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, processes = process()
    store = next(rendezvous("env://"))[0] if "MASTER_ADDR" in os.environ else dist.HashStore()
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over its restarts: the addresses of the processes that have ended must not be found.
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=processes,
                            timeout=timedelta(minutes=10))
    return device


def gather(mine):
    """The union of the sets that the processes give."""
    sets = [None] * process()[1]
    dist.all_gather_object(sets, mine)
    return set().union(*sets)


def from_first_process(compute):
    """compute() is called on the first process alone; every process gets its result, or its ValueError."""
    box = [None]
    if process()[0] == 0:
        try:
            box = [compute()]
        except ValueError as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise box[0]
    return box[0]


# ----------------------------------------------------------------------------------------------------------------------
# Images


def seed_of(*key):
    """A seed for torch from any numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def list_images(folder):
    """Relative paths of all images below a folder, sorted. Raises ValueError where there are none."""
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder}: --data takes a folder of images, for finetuning and evaluation "
                         f"one with train/CLASS/* and val/CLASS/*.")
    names = []
    for root, _, files in os.walk(folder, followlinks=True):
        below = os.path.relpath(root, folder)
        names += [os.path.normpath(os.path.join(below, f)) for f in files if f.lower().endswith(EXTENSIONS)]
    if not names:
        raise ValueError(f"There are no images in {folder} or below it (looked for {' '.join(EXTENSIONS)}).")
    return sorted(names)


def read_image(path):
    """An image file as uint8 RGB, (3, H, W). As in torchvision's ImageFolder, EXIF rotation is not applied and alpha is
    dropped. Raises an exception of some kind for a file that cannot be decoded.
    """
    if path.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
        # PIL reads what this cannot: a format under another's name, some kinds, and all once torchvision drops it.
        with contextlib.suppress(RuntimeError, AttributeError):
            image = torchvision.io.decode_image(path, mode="RGB")  # (3, H, W), about twice as fast as PIL
            return image if image.dtype == torch.uint8 else (image.int() >> 8).byte()  # 16-bit PNG
    from PIL import Image

    with Image.open(path) as image:
        return v2.functional.pil_to_tensor(image.convert("RGB"))


class ImageFiles:
    """Image files in a folder as (uint8 image, class index). Names are held in one string, which forked loader workers
    share; a list of a million would be copied into each of them, page by page, as its reference counts change.
    """

    def __init__(self, folder, names, classes=()):
        self.folder, self.classes = folder, {name: i for i, name in enumerate(classes)}
        self.names = "\n".join(names)
        self.ends = torch.tensor([0, *itertools.accumulate(len(name) + 1 for name in names)])

    def __len__(self):
        return len(self.ends) - 1

    def name(self, i):
        return self.names[self.ends[i] : self.ends[i + 1] - 1]

    def __getitem__(self, i):
        name = self.name(i)
        return read_image(os.path.join(self.folder, name)), self.classes.get(name.split(os.sep)[0], 0)


class Drawings:
    """The demonstration's images: one of five shapes filled with one of two textures, ten classes in all, of any
    colour, place, size and angle on a plain background with noise. The same `seed` draws the same images.
    """

    classes = [f"{texture} {shape}" for texture in ("striped", "checked")
               for shape in ("disc", "square", "triangle", "ring", "cross")]

    def __init__(self, n, size, seed):
        g = torch.Generator().manual_seed(seed)

        def uniform(low, high, *shape):
            return torch.rand(n, *shape, 1, 1, generator=g) * (high - low) + low

        self.labels = torch.randperm(n, generator=g) % 10
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
        x, y = x - uniform(-0.15, 0.15), y - uniform(-0.15, 0.15)  # (n, size, size) each
        angle, scale = uniform(-0.4, 0.4), uniform(0.7, 0.95)
        x, y = (x * angle.cos() + y * angle.sin()) / scale, (y * angle.cos() - x * angle.sin()) / scale
        radius, ax, ay = (x.square() + y.square()).sqrt(), x.abs(), y.abs()
        shapes = torch.stack([  # signed distances, roughly: negative inside
            radius - 0.9,  # disc
            torch.maximum(ax, ay) - 0.8,  # square
            torch.maximum(ax * 0.87 + y * 0.5, -y) - 0.55,  # triangle
            (radius - 0.7).abs() - 0.28,  # ring
            torch.minimum(torch.maximum(ax - 1, ay - 0.33), torch.maximum(ax - 0.33, ay - 1)),  # cross
        ])
        distance = shapes[self.labels % 5, torch.arange(n)]
        pitch, phase = uniform(6, 8), uniform(0, 2 * math.pi)
        stripes = (pitch * x + phase).sin()
        checks = stripes * (pitch * y + phase).sin()
        texture = torch.where(self.labels[:, None, None] < 5, stripes, checks * 2)
        inside, light = torch.sigmoid(-distance * size / 3), torch.sigmoid(texture * 4)
        ink, paper, background = uniform(0, 0.4, 3), uniform(0.6, 1, 3), uniform(0, 0.4, 3)  # (n, 3, 1, 1)
        filled = ink * light[:, None] + paper * (1 - light[:, None])
        image = background + (filled - background) * inside[:, None]
        image += 0.03 * torch.randn(image.shape, generator=g)
        self.images = (image.clamp(0, 1) * 255).byte()  # (n, 3, size, size)

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return f"drawing {i}"

    def __getitem__(self, i):
        return self.images[i], self.labels[i].item()


class Images(Dataset):
    """Transformed images of a source (ImageFiles or Drawings), as (uint8 image, label, index if unreadable or else -1).

    Items are asked for as (epoch, index), and seed, epoch and index alone decide every random choice of the transform.
    A file that cannot be decoded is replaced by another, or, where `replace` is false, comes with the label -1.
    """

    def __init__(self, source, transform, seed=0, replace=True):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        unreadable = -1
        for attempt in range(100 if self.replace else 1):
            chosen = seed_of(self.seed, epoch, index, attempt) % len(self) if attempt else index
            try:
                image, label = self.source[chosen]
                break
            except Exception:  # decoders raise many kinds for a damaged file
                unreadable = index
        else:  # black; a run in which so many cannot be decoded is about to stop
            image, label = torch.zeros(3, 1, 1, dtype=torch.uint8), 0 if self.replace else -1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return self.transform(image), label, unreadable


class Batches:
    """Sampler of this process's micro-batches, as lists of (epoch, index), from step `start` of the run to its end.

    An epoch is a random order of all images, cut into global batches (what is left over waits for the next epoch). A
    batch is cut into a share for each process, and a share into accum_steps micro-batches.
    """

    def __init__(self, images, args, start):
        self.images, self.args, self.start = images, args, start

    def __iter__(self):
        args, (rank, processes) = self.args, process()
        steps = self.images // args.batch_size
        for epoch in range(self.start // steps, args.epochs):
            order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed_of(args.seed, epoch)))
            for step in range(self.start % steps if epoch == self.start // steps else 0, steps):
                batch = order[step * args.batch_size : (step + 1) * args.batch_size]
                for micro_batch in batch.view(processes, args.accum_steps, -1)[rank].tolist():
                    yield [(epoch, index) for index in micro_batch]


def ignore_signals(_):
    """Loader workers leave SIGINT and SIGTERM to the training process, which ends them when it is ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(dataset, batches, args, device):
    """Batches of uint8 images, read ahead by --workers processes."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.workers, worker_init_fn=ignore_signals,
                      pin_memory=device.type == "cuda", prefetch_factor=4 if args.workers else None)


def move(tensor, device):
    """A tensor on the device, without waiting for a GPU to have it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@functools.lru_cache
def mean_and_std(device):
    """ImageNet's, (3, 1, 1) each; copied to the device once."""
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))


def normalize(images, device):
    """uint8 images (B, 3, H, W) -> float32 with ImageNet's mean and spread, on the device."""
    mean, std = mean_and_std(device)
    return (images.to(device, non_blocking=True).float() / 255 - mean) / std


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def prepare(model, args):
    """Compile the model, and have activations recomputed, where args say so.

    A single process compiles it whole, and on a GPU replays it as CUDA graphs: Python then launches a graph, not each
    of its kernels. Where gradients are accumulated there are no graphs, since a graph writes its gradients to the same
    memory each time, over those of the micro-batch before. With several processes the blocks are compiled, so that the
    gradients of one are sent while those of the next are computed.
    """
    model.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # which would cut the model in other places
        torch._functorch.config.activation_memory_budget = 0.9  # a quarter less memory for about 2% more time
        whole = process()[1] == 1
        mode = "reduce-overhead" if whole and args.accum_steps == 1 else None
        for module in [model] if whole else [*model.layers, *getattr(model, "decoder", [])]:
            module.compile(dynamic=False, mode=mode)  # three batch sizes: training's, evaluation's and its last


def matrix_flops(model):
    """Floating-point operations of the matrix products in a training step, for one image: forward, and twice backward.
    """
    images = torch.empty(1, 3, model.image_size, model.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(images)
    return 3 * counter.get_total_flops()


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
    """What the GPU reaches in a large bfloat16 matrix product, in floating-point operations per second, measured."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * len(a) ** 3 / milliseconds(lambda: a @ b, repeats=10) * 1000


# ----------------------------------------------------------------------------------------------------------------------
# Steps, checkpoints, and what goes on around them


def learning_rate(step, peak, warmup_steps, total_steps, minimum=0.0):
    """Linear warm-up from 0, then half a cosine down to `minimum`; by step, counted from 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


def optimizer_step(model, optimizer, loss, clip_grad=math.inf):
    """Clip the gradient norm and take the step, unless loss or gradient is not finite: then no process takes it.

    loss: this process's mean loss, a tensor. Returns the mean loss of all processes and whether the step was dropped,
    as tensors, without waiting for the GPU.
    """
    dist.all_reduce(loss)
    loss /= process()[1]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    dropped = ~(loss.isfinite() & norm.isfinite())
    optimizer.found_inf = dropped.float()  # fused optimisers skip the step where this is 1, as for GradScaler
    optimizer.step()
    optimizer.zero_grad()
    return loss, dropped


def save_checkpoint(path, checkpoint):
    """Write a checkpoint beside the old one, flush it, then put it in its place: whole or not at all."""
    beside = f"{path}.new"
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            os.remove(beside)
        if "DataLoader worker" in str(error):  # torch raises this wherever the process is when a worker dies
            raise
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise Stop(f"Cannot write {path}: {reason} The checkpoint before it is as it was.", everywhere=False) from None


def resume_checkpoint(args, model, images):
    """The checkpoint to continue from, --resume or --out's last.pth, or None. Raises ValueError where it cannot be
    read, or is of a run with another model, other arguments (MAY_CHANGE aside) or another number of images.
    """
    path = args.resume or os.path.join(args.out, "last.pth")
    found = args.resume is not None or os.path.exists(path)
    if from_first_process(lambda: found) != found:
        raise Stop(f"Only some nodes see {path}: --out must be a folder that all of them share.", everywhere=False)
    if not found:
        return None
    checkpoint = read_checkpoint(path)
    if "run" not in checkpoint or "optimizer" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint that a run can continue from.")
    shapes, own = ({k: v.shape for k, v in weights.items()} for weights in (checkpoint["model"], model.state_dict()))
    if shapes != own:
        raise ValueError(f"{path} is a checkpoint of another model, or of other classes: give another --out.")
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and checkpoint["args"].get(name) != value:
            raise ValueError(f"{path} was made with --{name} {checkpoint['args'].get(name)}, this run has {value}: "
                             f"give the same, or another --out.")
    if checkpoint["run"]["images"] != images:
        raise ValueError(f"{path} was made with {checkpoint['run']['images']} images, and --data now holds {images}: "
                         f"give the same, or another --out.")
    return checkpoint


class Progress:
    """What goes on around the steps of a run: the bar, log.jsonl, signals, dropped steps and unreadable files.

    All processes call its methods alike. A GPU's results, which one has to wait for, are read every tenth step only.
    """

    READ_EVERY = {"cpu": 1, "cuda": 10}
    MOST_DROPPED = 10  # steps in a row
    MOST_UNREADABLE = 0.01  # of all files

    def __init__(self, args, source, steps_per_epoch, device, state, model):
        self.full_speed = None  # images/s, were the step nothing but matrix products
        if process()[0] == 0 and device.type == "cuda":
            self.full_speed = matrix_rate(device) / matrix_flops(model) * process()[1]
        self.args, self.source, self.steps_per_epoch, self.first = args, source, steps_per_epoch, process()[0] == 0
        self.step = state.get("step", 0)
        self.totals = torch.tensor(state.get("totals", [0.0] * 4), device=device, dtype=torch.float64)
        self.unreadable = set(state.get("unreadable", []))
        self.new_unreadable, self.interrupted = set(), False
        self.saved_at = self.epoch_started = self.read_at = time.monotonic()
        self.epoch_first_step = self.read_step = self.step
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.interrupt)
        total, done = args.epochs * steps_per_epoch * args.batch_size, self.step * args.batch_size
        self.bar = tqdm(total=total, initial=done, unit=" images", unit_scale=True, disable=not self.first,
                        dynamic_ncols=True, smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 10)
        self.tensorboard = None
        if self.first:
            self.log, logged = open_log(os.path.join(args.out, "log.jsonl"))
            self.logged = logged if state else set()  # a run from the start writes its own lines
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(os.path.join(args.out, "tensorboard"))

    def interrupt(self, *_):
        self.interrupted = True

    def state(self):
        """What a checkpoint keeps of it."""
        return dict(step=self.step, images=len(self.source), totals=self.totals.tolist(),
                    unreadable=sorted(self.unreadable))

    def after_step(self, loss, dropped, unreadable, lr):
        """Count a step. Returns true where the run has been interrupted and should write its checkpoint and stop."""
        self.step += 1
        ok, bad = (~dropped).double(), dropped.double()
        loss_sum, taken, all_dropped, in_row = self.totals.unbind()
        self.totals = torch.stack([loss_sum + torch.where(dropped, 0.0, loss), taken + ok, all_dropped + bad,
                                   (in_row + bad) * bad])
        self.new_unreadable.update(i for i in unreadable if i >= 0 and i not in self.unreadable)
        if self.step % self.READ_EVERY[loss.device.type] and self.step % self.steps_per_epoch:
            return False
        return self.read_results(loss, lr)

    def read_results(self, loss, lr):
        flags = torch.tensor([self.interrupted, len(self.new_unreadable)], device=loss.device, dtype=torch.float)
        dist.all_reduce(flags)
        interrupted, new_unreadable = flags.tolist()
        if new_unreadable:
            self.gather_unreadable()
        if self.totals[3] >= self.MOST_DROPPED:
            raise Stop(f"The loss was not finite {self.totals[3]:.0f} steps in a row, up to step {self.step}: the run "
                       f"stops, and its last checkpoint is as it was. A smaller --blr may help.")
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        self.bar.set_description(f"epoch {epoch}/{self.args.epochs}", refresh=False)
        share = ""
        if self.full_speed:
            speed = (self.step - self.read_step) * self.args.batch_size / (time.monotonic() - self.read_at)  # images/s
            share = f", {speed / self.full_speed:.0%} of matrix rate"
            self.read_at, self.read_step = time.monotonic(), self.step
        self.bar.set_postfix_str(f"loss {loss.item():.4f}, lr {lr:.2e}{share}", refresh=False)
        self.bar.update(self.step * self.args.batch_size - self.bar.n)
        return interrupted > 0

    def gather_unreadable(self):
        """Tell every process of the files that any could not decode; name each once; stop where they are too many."""
        new = gather(self.new_unreadable) - self.unreadable
        self.unreadable |= new
        self.new_unreadable = set()
        for i in sorted(new):
            self.name_unreadable(self.source.name(i), "another image stands in for it")
        if len(self.unreadable) > self.MOST_UNREADABLE * len(self.source):
            raise Stop(f"{len(self.unreadable)} of {len(self.source)} images cannot be decoded, more than 1%: see "
                       f"{os.path.join(self.args.out, 'log.jsonl')} for their names.")

    def name_unreadable(self, name, instead):
        """Say and log, once, that a file cannot be decoded and what is done instead."""
        if self.write_log(dict(step=self.step, unreadable=name)):
            self.say(f"Cannot decode {name}: {instead}.")

    def checkpoint_due(self):
        """Whether --checkpoint_minutes have passed since the last one; the first process decides, which writes it."""
        return self.first and time.monotonic() - self.saved_at > 60 * self.args.checkpoint_minutes

    def save(self, checkpoint):
        """Write last.pth, on the first process. checkpoint: without "run" and "args", which are added here."""
        if self.first:
            save_checkpoint(os.path.join(self.args.out, "last.pth"),
                            dict(checkpoint, run=self.state(), args=vars(self.args)))
        self.saved_at = time.monotonic()

    def stop_interrupted(self):
        """End an interrupted run, on every process, once the first has saved it: torchrun ends all soon after one."""
        dist.barrier()
        raise Stop(f"Interrupted at step {self.step}, which is saved: the same command continues.",
                   code=os.EX_TEMPFAIL)

    def end_epoch(self, lr, **results):
        """Write the epoch's line to log.jsonl and TensorBoard, and start the next epoch's count."""
        loss_sum, taken, dropped, in_row = self.totals.tolist()
        images = (self.step - self.epoch_first_step) * self.args.batch_size
        seconds = time.monotonic() - self.epoch_started
        entry = dict(epoch=self.step // self.steps_per_epoch, step=self.step, loss=loss_sum / max(taken, 1), lr=lr,
                     dropped_steps=int(dropped), unreadable_images=len(self.unreadable),
                     images_per_second=round(images / seconds, 1), seconds=round(seconds, 1), **results)
        self.write_log(entry)
        if self.tensorboard:
            for name, value in entry.items():
                self.tensorboard.add_scalar(name, value, entry["epoch"])
            self.tensorboard.flush()
        told = {"loss", *results, *(["dropped_steps"] if dropped else [])}
        self.say(f"epoch {entry['epoch']}: " + ", ".join(
            f"{name} {value:.4g}" for name, value in entry.items() if name in told))
        self.totals = torch.tensor([0, 0, 0, in_row], device=self.totals.device, dtype=torch.float64)
        self.epoch_started, self.epoch_first_step = time.monotonic(), self.step

    def write_log(self, entry):
        """Append a line, unless the run has written it before. JSON has no NaN: null stands for it. Returns whether."""
        if not self.first or log_key(entry) in self.logged:
            return False
        self.logged.add(log_key(entry))
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        line = (json.dumps(entry) + "\n").encode()
        if os.write(self.log, line) < len(line):
            raise OSError(errno.ENOSPC, "No space left on device", os.path.join(self.args.out, "log.jsonl"))
        return True

    def say(self, line):
        if self.first:
            tqdm.write(line, file=sys.stderr)


def log_key(entry):
    """What a line of the log is about: an epoch, or a file that cannot be decoded."""
    return entry.get("unreadable", entry.get("epoch"))


def open_log(path):
    """Open a log of JSON lines to append to; what a crash has left of a line is taken off its end first.

    Returns its file descriptor and the keys of its lines.
    """
    log, keys, position, end = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), set(), 0, 0
    for line in os.pread(log, os.fstat(log).st_size, 0).splitlines(keepends=True):
        position += len(line)
        with contextlib.suppress(ValueError):
            keys.add(log_key(json.loads(line if line.endswith(b"\n") else b"")))
            end = position
    os.ftruncate(log, end)
    return log, keys


# ----------------------------------------------------------------------------------------------------------------------


def add_common_arguments(parser, out, image_size, epochs, blr, batch_size):
    """The flags that pretraining and finetuning share, with the defaults in which they differ."""
    parser.add_argument("--out", metavar="DIR", default=out, help="where the run goes")
    parser.add_argument("--model", choices=MODELS, default="arm_base", help="size")
    parser.add_argument("--image_size", type=int, default=image_size, help="pixels")
    parser.add_argument("--patch_size", type=int, default=16, help="pixels")
    parser.add_argument("--epochs", type=int, default=epochs, help="passes over the images")
    parser.add_argument("--warmup_epochs", type=float, default=5, help="in which the learning rate rises")
    parser.add_argument("--blr", type=float, default=blr, help="peak learning rate for a batch of 256")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="of all processes together")
    parser.add_argument("--accum_steps", type=int, default=1, help="split each batch in time, to save memory")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="of matrices")
    parser.add_argument("--workers", type=int, help="loader processes for each training process (default: its share of "
                        "the cores, at most 16)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--drawings", type=int, help="images of the demonstration")
    parser.add_argument("--compile", type=int, choices=[0, 1], help="torch.compile (default: on GPUs, with our scan)")
    parser.add_argument("--activation_checkpointing", action="store_true",
                        help="recompute the encoder's activations: less memory, about a third more work")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
                        help="what to train on")
    parser.add_argument("--resume", metavar="CKPT", help="continue from this checkpoint (default: last.pth in --out)")
    parser.add_argument("--checkpoint_minutes", type=float, default=10, help="at most so long between checkpoints")
    parser.set_defaults(drawings=1)  # the demonstration has its own


def parse_args(parser, demonstration, recipes):
    """Parse, with the defaults of the model's recipe, or without --data those of the demonstration; check numbers."""
    args, _ = parser.parse_known_args()
    parser.set_defaults(**recipes.get(args.model, {}))
    if args.data is None:
        parser.set_defaults(**demonstration)
    args = parser.parse_args()
    if args.workers is None:
        args.workers = min(16, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.compile is None:
        args.compile = int(args.device == "cuda" and os.environ.get("ARM_SCAN", "triton") == "triton")
    with bad_input():
        for name in ("batch_size", "accum_steps", "epochs", "image_size", "patch_size", "drawings"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}.")
        for name in ("blr", "weight_decay", "warmup_epochs", "workers", "checkpoint_minutes"):
            if not 0 <= getattr(args, name) < math.inf:
                raise ValueError(f"--{name} must be 0 or more, not {getattr(args, name)}.")
        if args.warmup_epochs >= args.epochs:
            raise ValueError(f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}: "
                             f"choose more epochs, or a shorter warm-up.")
        processes = process()[1]
        if args.batch_size % (processes * args.accum_steps):
            raise ValueError(f"--batch_size {args.batch_size} does not divide into {processes} processes x "
                             f"{args.accum_steps} --accum_steps: choose a multiple of {processes * args.accum_steps}.")
    return args


def check_run(args, images):
    """Raises ValueError where there are too few images for a batch, or --out cannot be written or has another run."""
    if images < args.batch_size:
        raise ValueError(f"--batch_size {args.batch_size} is more than the {images} training images: choose a "
                         f"smaller one.")
    try:
        os.makedirs(args.out, exist_ok=True)
        log = os.open(os.path.join(args.out, "log.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ValueError(f"Cannot write to --out {args.out}: {error.strerror}.") from None
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it stays open, and so locked, while the process lives
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # else the file system has no locks
            raise ValueError(f"Another run writes to --out {args.out}: wait for it, or give another.") from None


def get_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="images: train/CLASS/*, CLASS/* or just images; labels are not "
                        "used. Without it, a demonstration on drawn images")
    add_common_arguments(parser, out="runs/pretrain", image_size=192, epochs=1600, blr=1.5e-4, batch_size=2048)
    parser.add_argument("--cluster_size", type=int, default=4, help="patches along a cluster side")
    parser.add_argument("--clip_grad", type=float, default=3.0, help="largest gradient norm")
    args = parse_args(parser, DEMONSTRATION, RECIPES)
    with bad_input():
        if not args.clip_grad > 0:
            raise ValueError(f"--clip_grad must be more than 0, not {args.clip_grad}; inf for no clipping.")
    return args


def save_picture(path, model, images):
    """Write a PNG: images above, the clusters as predicted below. images: normalised, (n, 3, H, W)."""
    pair = torch.cat([images, model.reconstruct(images)]).cpu()  # (2 n, 3, H, W)
    pixels = pair * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    pixels = F.interpolate(pixels.clamp(0, 1), scale_factor=max(1, 128 // images.shape[-1]))
    buffer = io.BytesIO()
    save_image(make_grid(pixels, nrow=len(images), pad_value=1), buffer, format="png")
    with open(path, "wb") as file:
        file.write(buffer.getvalue())


def main():
    args = get_args()
    device = start_processes(args.device)
    first = process()[0] == 0
    if first and args.data is None:
        print("Demonstration: ARM learns to predict the next cluster of small drawn images. For a real run: --data.")

    # Data
    with bad_input():
        if args.data is None:
            source = Drawings(args.drawings, args.image_size, seed=0)
        else:
            train = os.path.join(args.data, "train")
            folder = train if os.path.isdir(train) else args.data
            source = ImageFiles(folder, from_first_process(lambda: list_images(folder)))
    crop = v2.RandomResizedCrop(args.image_size, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC)
    dataset = Images(source, v2.Compose([crop, v2.RandomHorizontalFlip()]), args.seed)
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    # Model
    torch.manual_seed(args.seed)
    with bad_input():
        size = MODELS[args.model]
        arm = ARM(args.image_size, args.patch_size, args.cluster_size, **size, decoder_dim=min(512, size["dim"]))
        from_first_process(lambda: check_run(args, len(source)))
        checkpoint = resume_checkpoint(args, arm, len(source))
    prepare(arm, args)
    model = DistributedDataParallel(arm.to(device), gradient_as_bucket_view=True)
    decayed = [p for p in arm.parameters() if p.ndim > 1]
    others = [p for p in arm.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    if checkpoint:
        arm.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    progress = Progress(args, source, steps_per_epoch, device, checkpoint["run"] if checkpoint else {}, arm)
    del checkpoint  # which is large
    if first:
        parameters = sum(p.numel() for p in arm.parameters())
        tqdm.write(f"{args.model}, {parameters:,} parameters; {len(source):,} images, {args.epochs} epochs of "
                   f"{steps_per_epoch} steps, from step {progress.step}; {process()[1]} x {device.type}; to {args.out}")

    # Training
    batches = iter(make_loader(dataset, Batches(len(source), args, progress.step), args, device))
    while progress.step < total_steps:
        lr = learning_rate(progress.step, args.blr * args.batch_size / 256, args.warmup_epochs * steps_per_epoch,
                           total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, unreadable = torch.zeros((), device=device), []
        for micro_step in range(args.accum_steps):
            images, _, bad = next(batches)
            last = micro_step == args.accum_steps - 1
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    micro_loss = model(normalize(images, device)) / args.accum_steps
                micro_loss.backward()
            loss += micro_loss.detach()
            unreadable += bad.tolist()
        loss, dropped = optimizer_step(model, optimizer, loss, args.clip_grad)
        interrupted = progress.after_step(loss, dropped, unreadable, lr)

        epoch, inside_epoch = divmod(progress.step, steps_per_epoch)
        if not inside_epoch:
            progress.end_epoch(lr)
            if first and (epoch % max(1, args.epochs // 20) == 0 or epoch == args.epochs):
                n = min(8, len(dataset))
                pictured = torch.stack([dataset[0, i * len(dataset) // n][0] for i in range(n)])
                save_picture(os.path.join(args.out, "predictions.png"), arm, normalize(pictured, device))
        if interrupted or not inside_epoch or progress.checkpoint_due():
            progress.save(dict(model=arm.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch))
        if interrupted:
            progress.stop_interrupted()

    progress.bar.close()
    if first:
        command = f"torchrun --standalone --nproc_per_node {process()[1]} finetune.py --init {args.out}/last.pth"
        usual = DEMONSTRATION
        if args.data:
            labelled = args.data if os.path.isdir(os.path.join(args.data, "val")) else "DIR_OF_train_AND_val"
            command += f" --data {labelled} --batch_size {min(args.batch_size, 1024)}"
            usual = dict(patch_size=16, image_size=args.image_size) if args.patch_size == 16 else {}  # 224 follows 192
        for name in ("model", "image_size", "patch_size"):
            if getattr(args, name) != usual.get(name):
                command += f" --{name} {getattr(args, name)}"
        print(f"Done: weights in {args.out}/last.pth, what they predict in {args.out}/predictions.png.\n"
              f"Next, finetune: {command}")


if __name__ == "__main__":
    run(main)
