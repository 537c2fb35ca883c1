"""Pretrain ARM by predicting the next cluster of an image (section 3.2; recipe: appendix of the ARM paper).

    python pretrain.py                                                       # demonstration, a few minutes on a CPU
    torchrun --nproc_per_node 8 pretrain.py --data /data/imagenet            # the paper's ARM-B
    torchrun --nproc_per_node 8 pretrain.py --data /data/imagenet --model arm_large

The defaults are the paper's recipe; without --data, the demonstration's. A run goes to --out (last.pth, log.jsonl,
predictions.png); the same command continues it. The order of the images and their crops are a function of seed, epoch
and sample alone, and an interruption changes nothing of what is computed. What finetune.py needs, too, stands at the
end, in chapters.
"""

import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import save_image
from tqdm import tqdm

from arm import ARM, MAE, MODELS, ORDERS, BadInput, check, check_order, kernels, load_weights, read_checkpoint

RECIPES = {  # where the paper's recipe differs between models; of the demonstration, which needs no data
    "arm_large": dict(batch_size=1024),
    "arm_huge": dict(batch_size=512, epochs=800),
    "demo": dict(model="arm_tiny", image_size=48, patch_size=8, cluster_size=2, epochs=6, warmup_epochs=1,
                 batch_size=64, blr=8e-3, workers=0, compile=0, out="runs/demo_pretrain"),
}


def get_args():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--data", help="images: train/CLASS/*, CLASS/* or just images. Without it, a demonstration on drawn images")
    flag("--init", help="weights to start from, a file or URL; without it, from scratch")
    flag("--out", default="runs/pretrain", help="where the run goes; one that is there is continued")
    flag("--model", choices=MODELS, default="arm_base", help="size of the encoder")
    flag("--image_size", type=int, default=192, help="pixels")
    flag("--patch_size", type=int, default=16, help="pixels")
    flag("--cluster_size", type=int, default=4, help="patches along a cluster side")
    # What the paper's ablations vary
    flag("--order", choices=ORDERS, default="row", help="order in which clusters are read")
    flag("--target", choices=["normalized", "raw"], default="normalized", help="pixels to predict")
    flag("--decoder_dim", type=int, help="width of the decoder, in 64s; by default 512, but at most the encoder's")
    flag("--decoder_depth", type=int, default=4, help="blocks of the decoder")
    flag("--objective", choices=["arm", "mae"], default="arm", help="predict the next cluster, or hidden patches")
    # Optimisation
    flag("--epochs", type=int, default=1600, help="passes over the images")
    flag("--warmup_epochs", type=float, default=5, help="epochs in which the learning rate rises")
    flag("--batch_size", type=int, default=2048, help="of all processes together")
    flag("--blr", type=float, default=1.5e-4, help="peak learning rate for a batch of 256")
    flag("--weight_decay", type=float, default=0.05, help="of all but biases, norms, D and positions")
    flag("--clip_grad", type=float, default=3.0, help="largest gradient norm; inf for no clipping")
    flag("--seed", type=int, default=0, help="of all random choices")
    flag("--drawings", type=int, default=1600, help="images of the demonstration")
    args = parse_args(parser, RECIPES)
    check(args.objective == "arm" or args.order == "row", "--order is of clusters, which --objective mae has not")
    check(args.clip_grad > 0, f"--clip_grad must be more than 0, not {args.clip_grad}; inf for no clipping")
    return args


def main():
    args = get_args()
    device = start_processes(args)

    # Data
    crop = v2.RandomResizedCrop(args.image_size, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    if args.data:
        train = os.path.join(args.data, "train")
        folder = train if os.path.isdir(train) else args.data
        source = ImageFiles(folder, from_first_process(lambda: list_images(folder)))
    else:
        source = Drawings(args.drawings, args.image_size, seed=0)
    dataset = Images(source, transform, args.seed)

    # Model
    torch.manual_seed(args.seed)
    size, kind = MODELS[args.model], dict(arm=ARM, mae=MAE)[args.objective]
    model = kind(args.image_size, args.patch_size, args.cluster_size, **size, order=args.order, target=args.target,
                 decoder_dim=args.decoder_dim or min(512, size["dim"]), decoder_depth=args.decoder_depth,
                 seed=args.seed).to(device)
    run = Run(args, model, source, device)
    if args.init and not run.checkpoint:
        from_first_process(lambda: load_weights(model, args.init))  # the others receive them from DDP
    prepare(model, args)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)
    if run.checkpoint:
        model.load_state_dict(run.checkpoint["model"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
    run.start()

    # Training
    batches = load(dataset, shuffled(len(dataset), args, run.step), args.workers, device)
    picture = os.path.join(args.out, "predictions.png")
    while run.step < args.epochs * run.steps_per_epoch:
        lr = learning_rate(run.step / run.steps_per_epoch, args)
        torch.manual_seed(seed_of(args.seed, run.step, process()[0]))  # of the patches that --objective mae hides
        step_loss = torch.zeros((), device=device)
        for micro_step in range(args.accum_steps):
            images, _, unreadable = next(batches)
            ddp.require_backward_grad_sync = micro_step == args.accum_steps - 1  # DDP adds gradients up in the last
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = ddp(normalize(images, device)) / args.accum_steps
            loss.backward()
            step_loss += loss.detach()
            run.unreadable += unreadable[unreadable >= 0].tolist()
        optimizer_step(ddp, optimizer, lr, step_loss, args.clip_grad)

        if run.after_step(step_loss, lr):  # every step on CPUs; on GPUs every tenth, and at an epoch's end
            if run.epoch_ended:
                run.log_epoch(lr=lr)
            if run.save_due:
                run.save(model=model.state_dict(), optimizer=optimizer.state_dict())
                if run.first and args.objective == "arm" and not run.interrupted:
                    save_picture(picture, model, dataset, device)
            run.continue_or_stop()
    predicted = f", what they predict in {picture}" if os.path.exists(picture) else ""
    run.end(f"Weights in {args.out}/last.pth{predicted}.\n"
            f"Next, finetune: {finetune_command(args, len(source))}")


@torch.no_grad()
def save_picture(path, model, dataset, device):
    """Write a PNG of three rows: images; what the model is given of them, the first cluster (framed) and each patch's
    mean; its predictions.
    """
    n = min(8, len(dataset))
    images = normalize(torch.stack([dataset[0, i * len(dataset) // n][0] for i in range(n)]), device)
    predicted = model.predict(images)
    rows = [images, model.reconstruct(images, 0 * predicted), model.reconstruct(images, predicted)]
    mean, std = mean_and_std(device)
    pixels = (torch.cat(rows) * std + mean).clamp(0, 1)  # (3 n, 3, H, W)
    first = torch.zeros_like(model.to_patches(pixels)).index_fill(1, model.order[: model.tokens_per_cluster], 1)
    scale = max(1, 128 // images.shape[-1])
    pixels, first = (F.interpolate(t, scale_factor=scale) for t in (pixels, model.to_images(first)))
    frame = F.max_pool2d(first, 5, 1, 2) > first  # two pixels around it
    with writing(path):
        save_image(torch.where(frame, 1.0, pixels), path, nrow=n, pad_value=1)


SMALL_DATA = (" --batch_size 32 --blr 8e-3 --epochs 50 --layer_decay 0.85 --drop_path 0 --mixup 0 --cutmix 0 "
              "--augment 0 --erasing 0 --crop_scale 0.5 --ema_decay 0.99")


def finetune_command(args, images):
    """What to type next: the paper's recipe, or SMALL_DATA for fewer than 50,000 images."""
    launcher, data = "python", ""
    if process()[1] > 1:
        launcher = f"torchrun --standalone --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', 1)}"
    if args.data:
        labelled = args.data if os.path.isdir(os.path.join(args.data, "val")) else "DIR_OF_train_AND_val"
        data = f" --data {shlex.quote(labelled)}{SMALL_DATA if images < 50_000 else ''}"
    size = 224 if (args.image_size, args.patch_size) == (192, 16) else args.image_size  # as in the paper
    return (f"{launcher} finetune.py{data} --init {shlex.quote(args.out)}/last.pth --model {args.model} "
            f"--image_size {size} --patch_size {args.patch_size}")


# ----------------------------------------------------------------------------------------------------------------------
# Flags of both scripts


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def make_parser(description):
    """A parser with the flags that may change when a run is continued: they say how it is computed, and not what (but
    for what is drawn or normalised for each micro-batch).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message}; python {parser.prog} --help tells what there is")
    flag = parser.add_argument_group("what may change when a run is continued").add_argument
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    flag("--workers", type=int, default=min(16, max(1, cores)), help="loader processes for each training process")
    flag("--accum_steps", type=int, default=1, help="split each batch in time, to save memory")
    flag("--activation_checkpointing", action="store_true", help="less memory for about a third more work")
    flag("--compile", type=int, choices=[0, 1], default=int(cuda and os.environ.get("ARM_SCAN", "triton") == "triton"),
         help="torch.compile")
    flag("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="what to train on")
    flag("--resume", help="a checkpoint to continue from where --out has no last.pth yet")
    flag("--checkpoint_minutes", type=float, default=10, help="at most so long between checkpoints")
    return parser


MAY_CHANGE = {"data", "out", "workers", "accum_steps", "activation_checkpointing", "compile", "device", "resume",
              "checkpoint_minutes", "eval_every", "drawings"}  # the number of images is compared by itself
DEFAULTS = {}  # of the flags, for checkpoints that do not know them all


def parse_args(parser, recipes, **known):
    """The arguments; defaults are the model's recipe's, those of the demonstration without --data, or `known`."""
    args, _ = parser.parse_known_args()
    demo = {} if args.data else recipes["demo"]
    on_cpu = {"compile": 0} if args.device == "cpu" else {}
    parser.set_defaults(**{**recipes.get(args.model, {}), **demo, **on_cpu, **known})
    args = parser.parse_args()
    DEFAULTS.update(vars(parser.parse_args([])))
    for name, value in vars(args).items():
        check(not isinstance(value, float) or 0 <= value < math.inf or name == "clip_grad",
              f"--{name} must be 0 or more, not {value}")
        least = 0 if name in ("workers", "compile", "seed") else 1
        check(type(value) is not int or value >= least, f"--{name} must be at least {least}, not {value}")
    check(args.warmup_epochs < args.epochs, f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs "
                                            f"{args.epochs}: choose more epochs, or a shorter warm-up")
    evaluating, parts = vars(args).get("eval") or vars(args).get("predict"), process()[1] * args.accum_steps
    check(evaluating or args.batch_size % parts == 0, f"--batch_size {args.batch_size} does not divide into "
          f"{process()[1]} processes x {args.accum_steps} --accum_steps: choose a multiple of {parts}")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Images


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
OF_SYSTEMS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}  # and all that is hidden


def list_images(folder):
    """Relative paths of all images below a folder, sorted; what is passed over is told in one line. Links are followed,
    but no folder is read twice. Raises BadInput where there are no images, or a folder cannot be listed.
    """
    check(os.path.isdir(folder), f"There is no folder {folder}: --data takes a folder of images, for finetuning and "
                                 f"evaluation one with train/CLASS/* and val/CLASS/*")
    top = os.path.join(os.path.realpath(folder), "")
    images, others, empty, entered = [], [], [], {top}

    def enter(path):
        name, real = os.path.basename(path), os.path.join(os.path.realpath(path), "")
        # What a link into the folder itself leads to is met by its own name, too, which may be that of another class.
        if name[0] == "." or name in OF_SYSTEMS or real in entered or os.path.islink(path) and real.startswith(top):
            return False
        entered.add(real)
        return True

    def refuse(error):
        raise BadInput(f"the folder {error.filename} cannot be listed: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        below, before = os.path.relpath(root, folder), len(images)
        folders[:] = [name for name in sorted(folders) if enter(os.path.join(root, name))]
        for name in sorted(name for name in files if name[0] != "."):
            kind = images if name.lower().endswith(IMG_EXTENSIONS) else others
            kind.append(os.path.normpath(os.path.join(below, name)))
        if len(images) == before and not folders:
            empty.append(below)
    check(images, f"There are no images in {folder} or below it (looked for {' '.join(IMG_EXTENSIONS)})")
    if others or empty:
        print(f"{folder}: passed over {len(others)} files of other kinds{', such as ' + others[0] if others else ''}; "
              f"folders without images: {', '.join(empty[:5]) or 'none'}{', ...' if len(empty) > 5 else ''}")
    return sorted(images)


def read_image(path):
    """An image file as uint8 RGB, (3, H, W). As in torchvision's ImageFolder, EXIF rotation is not applied and alpha is
    dropped. Of 16 bits the high byte is kept; floats are 0 to 1. Raises an exception of some kind for all else.
    """
    if path.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
        # PIL reads what this cannot: a format under another's name, some kinds, and all once torchvision drops it.
        with contextlib.suppress(RuntimeError, AttributeError):
            image = torchvision.io.decode_image(path, mode="RGB")  # (3, H, W), about twice as fast as PIL
            if image.ndim == 3:
                return image if image.dtype == torch.uint8 else (image.int() >> 8).byte()
    with Image.open(path) as image:
        if image.mode[0] not in "IF":
            return v2.functional.pil_to_tensor(image.convert("RGB"))
        pixels, most = np.asarray(image), 1 if image.mode == "F" else 65535  # grey, of 16 or more bits
        check(pixels.min() >= 0 and pixels.max() <= most, f"its values, {pixels.min():g} to {pixels.max():g}, are not "
                                                          f"from 0 to {most}")
        return torch.from_numpy((pixels * (65535 / most)).astype(np.int32) >> 8).byte().expand(3, -1, -1)


class ImageFiles:
    """Image files in a folder as (uint8 image, label). Names are held as one array of bytes, which forked loader
    workers share; a list of a million would be copied into each of them, page by page, as its reference counts change.
    """

    blank = 0  # the label of a black image, where nothing can be decoded

    def __init__(self, folder, names, labels=None):
        self.folder, self.names = folder, np.array([os.fsencode(name) for name in names])
        self.labels = np.zeros(len(names), dtype=np.int64) if labels is None else np.array(labels)

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return os.fsdecode(self.names[i])

    def __getitem__(self, i):
        return read_image(os.path.join(self.folder, self.name(i))), self.labels[i].item()


def seed_of(*key):
    """A seed for torch from any numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


class Images(Dataset):
    """Transformed images of a source (ImageFiles or Drawings), as (uint8 image, label, index if unreadable, else -1).

    transform: (image, label) -> (image, label). Items are asked for as (epoch, index), and seed, epoch and index alone
    decide every random choice of it.
    A file that cannot be decoded is replaced by another, or, where `replace` is false, comes with the label -1.
    """

    def __init__(self, source, transform, seed=0, replace=True):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        unreadable, index = -1, key[1]
        for attempt in range(100 if self.replace else 1):
            try:
                image, label = self.source[seed_of(self.seed, *key, attempt) % len(self) if attempt else index]
                break
            except Exception:  # decoders raise many kinds for a damaged file
                unreadable = index
        else:  # black; a run in which so many cannot be decoded is about to stop
            image, label = torch.zeros(3, 1, 1, dtype=torch.uint8), self.source.blank if self.replace else -1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, *key))  # the CPU's alone
            return *self.transform(image, label), unreadable


def shuffled(n, args, start):
    """This process's micro-batches, as lists of (epoch, index), from step `start` of the run to its end.

    An epoch is a random order of all n images, cut into global batches (what is left over is not seen in this epoch). A
    batch is cut into a share for each process, and a share into accum_steps micro-batches.
    """
    rank, processes = process()
    steps = n // args.batch_size
    for step in range(start, args.epochs * steps):
        epoch, i = divmod(step, steps)
        if i == 0 or step == start:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(args.seed, epoch)))
        batch = order[i * args.batch_size : (i + 1) * args.batch_size]
        for micro_batch in batch.view(processes, args.accum_steps, -1)[rank].tolist():
            yield [(epoch, index) for index in micro_batch]


def ignore_signals(_):
    """Loader workers leave SIGINT and SIGTERM to the training process, which ends them when it is ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def collate(samples):
    """A batch of items of Images. Images and labels are stacked; labels that are dictionaries stay a list of them."""
    images, labels, unreadable = zip(*samples)
    labels = list(labels) if isinstance(labels[0], dict) else default_collate(labels)
    return default_collate(images), labels, torch.tensor(unreadable)


def load(dataset, batches, workers, device):
    """An iterator of batches of uint8 images, read ahead by `workers` processes."""
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals,
                           collate_fn=collate, pin_memory=device.type == "cuda",
                           prefetch_factor=4 if workers else None))


@functools.lru_cache
def mean_and_std(device):
    """ImageNet's, (3, 1, 1) each; copied to the device once."""
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))


def normalize(images, device):
    """uint8 images (B, 3, H, W) -> float32 with ImageNet's mean and spread, on the device."""
    mean, std = mean_and_std(device)
    return (images.to(device, non_blocking=True).float() / 255 - mean) / std


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """The optimiser's groups: weight decay for all but biases, norms, D, positions and CLS; layer-wise learning rates.

    With n = depth + 1, a parameter of layer g has its rate multiplied by layer_decay ** (n - g): the embeddings are
    layer 0, block i is i + 1, all after the blocks is n. Groups have "names", "lr_scale" and "weight_decay". Parameters
    of rate 0 are frozen.
    """
    n, groups = len(model.layers) + 1, {}
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        layer = int(rest[0]) + 1 if part == "layers" else 0 if part in ("patch_embed", "pos_embed", "cls_token") else n
        vector = parameter.ndim == 1 or part in ("pos_embed", "cls_token") or name.endswith(("_bias", ".D"))
        key = (layer_decay ** (n - layer), 0.0 if vector else weight_decay)
        group = groups.setdefault(key, dict(params=[], names=[], lr_scale=key[0], weight_decay=key[1]))
        group["params"].append(parameter)
        group["names"].append(name)
        parameter.requires_grad_(group["lr_scale"] > 0)
    return list(groups.values())


def learning_rate(epoch, args, minimum=0.0, schedule="cosine"):
    """Linear warm-up from 0, then half a cosine or a straight line ("line") down to `minimum`, or ("steps") a tenth
    after 3/4 of all epochs and a hundredth after 11/12; epoch: how many have passed, a fraction.
    """
    peak = args.blr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    if schedule == "steps":
        return peak * 0.1 ** ((epoch >= args.epochs * 3 / 4) + (epoch >= args.epochs * 11 / 12))
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return minimum + (peak - minimum) * (1 - progress if schedule == "line" else (1 + math.cos(math.pi * progress)) / 2)


def optimizer_step(model, optimizer, lr, loss, clip_grad=math.inf):
    """Clip the gradient norm and take the step, unless loss or gradient is not finite: then no process takes it.

    loss: this process's mean loss, which becomes that of all, or nan where the step is dropped, without waiting for the
    GPU.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    dist.all_reduce(loss)
    loss /= dist.get_world_size()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    loss.copy_(torch.where(norm.isfinite(), loss, math.nan))
    optimizer.found_inf = (~loss.isfinite()).float()  # where it is 1, fused optimisers skip the step
    optimizer.step()
    optimizer.zero_grad()


def prepare(model, args):
    """Compile the model and recompute activations, where args say so; take batch norm's statistics over all processes.

    On one machine it is compiled whole, and on GPUs replayed as CUDA graphs, so that Python launches a graph and not
    each kernel; but not where gradients are accumulated, since a graph writes its gradients over those of the
    micro-batch before. On several machines the blocks are compiled, so that the gradients of one travel while those of
    the next are computed; and of models that detect or segment, since their heads meet ever other shapes.
    """
    for block in model.layers:
        block.recompute = args.activation_checkpointing
    if process()[1] > 1 and model.pos_embed.is_cuda:  # there is none for CPUs
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # which would cut the model in other places
        torch._dynamo.config.recompile_limit = 64  # of what blocks share: a version for each batch and drop rate
        torch._functorch.config.activation_memory_budget = 0.9  # a quarter less memory for about 2% more time
        whole = process()[1] <= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) and not hasattr(model, "pyramid")
        mode = "reduce-overhead" if whole and args.accum_steps == 1 else None
        for module in [model] if whole else [*model.layers, *getattr(model, "decoder", [])]:
            module.compile(dynamic=False, mode=mode)  # for each batch size: training's, evaluation's and its last


# ----------------------------------------------------------------------------------------------------------------------
# A run: its folder, what it counts, the bar, signals


class Stop(Exception):
    """(sentence, exit code): ends the run on every process; 75 (EX_TEMPFAIL) is interrupted, 1 any other reason."""


class Run:
    """What goes on around the steps. All processes call its methods alike; the first one writes."""

    READ_EVERY = {"cpu": 1, "cuda": 10}  # steps; to read a GPU's results is to wait for it
    MOST_DROPPED = 10  # steps in a row
    MOST_UNREADABLE = 0.01  # of an epoch's images

    def __init__(self, args, model, source, device, classes=()):
        """Locks --out and reads the checkpoint to continue from, if any. Raises BadInput where it is of another run."""
        self.args, self.model, self.source, self.device, self.classes = args, model, source, device, list(classes)
        self.first, self.steps_per_epoch = process()[0] == 0, len(source) // args.batch_size
        check(self.steps_per_epoch, f"--batch_size {args.batch_size} is more than the {len(source)} training images")
        from_first_process(self.open_log)
        last = os.path.join(args.out, "last.pth")
        path = last if os.path.exists(last) else args.resume
        check(len(union([path])) == 1, f"only some machines see {last}: --out must be a folder that all share")
        self.checkpoint = read_checkpoint(path) if path else {}
        if path:
            self.check_same_run(path)
        state = self.checkpoint.get("run", {})
        self.step = state.get("step", 0)
        self.losses = state.get("losses", [])  # of the epoch so far
        self.unreadable = state.get("unreadable", [])  # indices, of the epoch so far
        self.dropped_in_row = state.get("dropped_in_row", 0)
        self.pending, self.signalled = [], False

    def open_log(self):
        """Open log.jsonl and lock it while this process lives: one run writes to a folder."""
        self.log = open_in(self.args.out, "log.jsonl")
        try:
            fcntl.lockf(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            check(error.errno not in (errno.EAGAIN, errno.EACCES),  # else the file system has no locks
                  f"another run writes to --out {self.args.out}: wait for it, or give another")

    def check_same_run(self, path):
        """Raises BadInput where a checkpoint is of another model, other arguments, images, or order of the tokens."""
        found, own = self.checkpoint, {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        check("run" in found and "optimizer" in found, f"{path} is not a checkpoint that a run can continue from")
        shapes = {name: tensor.shape for name, tensor in found["model"].items()}
        check(shapes.keys() == own.keys(), f"{path} is a checkpoint of another model: give another --out")
        for name, value in vars(self.args).items():
            made = found["args"].get(name, DEFAULTS.get(name))  # it may not know a flag that is new
            check(name in MAY_CHANGE or made == value, f"{path} was made with --{name} {made}, this run has {value}: "
                                                       f"give the same, or another --out")
        check(found["run"]["images"] == len(self.source), f"{path} was made with {found['run']['images']} images, and "
              f"--data now holds {len(self.source)}: give the same, or another --out")
        only_in_one = {*found["classes"]} ^ {*self.classes}
        check(not only_in_one, f"{path} was finetuned on {len(found['classes'])} classes, the images are of "
              f"{len(self.classes)}, and {min(only_in_one, default='')} is only among one of them: give another --out")
        check(shapes == own, f"{path} is a checkpoint of another model: give another --out")
        check_order(self.model, found["model"], path)

    def start(self, more=""):
        """Say what is trained, show the bar, take signals, and cut off the log what is computed again or damaged."""
        args, size = self.args, self.args.batch_size
        self.checkpoint = None  # which is large
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.interrupt)
        self.tensorboard = None
        if self.first:
            self.log.seek(0)
            end = position = 0
            for line in self.log:
                position += len(line)
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    end = position if json.loads(line)["step"] <= self.step and line.endswith(b"\n") else end
            self.log.truncate(end)
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(os.path.join(args.out, "tensorboard"))
            origin = "scratch" if args.init in (None, "none") else args.init
            parameters = sum(p.numel() for p in self.model.parameters())
            tqdm.write(f"{args.model}, begun from {origin}, {parameters:,} parameters{more}; "
                       f"{len(self.source):,} images, {args.epochs} epochs of {self.steps_per_epoch} steps, "
                       f"now at step {self.step}; peak learning rate {args.blr * size / 256:.2g}; {process()[1]} x "
                       f"{self.device.type}; to {args.out}", file=sys.stderr)
        self.bar = tqdm(total=args.epochs * self.steps_per_epoch * size, initial=self.step * size, unit_scale=True,
                        bar_format="{desc}{percentage:.0f}%|{bar}| {n_fmt}/{total_fmt} images [{elapsed}{postfix}]",
                        disable=not self.first, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)
        if args.compile:
            self.bar.set_postfix_str("compiling, which takes a minute or two")
        self.marks = collections.deque(maxlen=1 + 100 // self.READ_EVERY[self.device.type])  # (step, seconds trained)
        self.seconds, self.epoch_step, self.epoch_seconds = 0.0, self.step, 0.0
        self.resumed_at = self.saved_at = self.epoch_at = time.monotonic()

    def interrupt(self, *_):
        self.signalled = True  # this process alone; after_step has all agree on whether the run is interrupted

    def after_step(self, loss, lr):
        """Count a step, and now and then read results. Returns whether it did: then the epoch's line, a checkpoint or
        the end may be due (epoch_ended, save_due, interrupted).
        """
        args, source = self.args, self.source
        self.step += 1
        self.pending.append(loss)
        self.epoch, steps = divmod(self.step, self.steps_per_epoch)
        self.epoch_ended = steps == 0
        if self.step % self.READ_EVERY[self.device.type] and not self.epoch_ended:
            return False
        losses, self.pending = torch.stack(self.pending).tolist(), []
        for value in losses:
            self.dropped_in_row = 0 if math.isfinite(value) else self.dropped_in_row + 1
            if self.dropped_in_row == self.MOST_DROPPED:
                raise Stop(f"The loss was not finite {self.MOST_DROPPED} steps in a row, up to step {self.step}: the "
                           f"run stops, and its last checkpoint is as it was. A smaller --blr may help", 1)
        self.losses += losses
        late = self.first and time.monotonic() - self.saved_at >= 60 * args.checkpoint_minutes
        flags = torch.tensor([self.signalled, late, len(self.unreadable)], dtype=torch.float, device=self.device)
        dist.all_reduce(flags)
        self.interrupted, late, some_unreadable = (flags > 0).tolist()
        self.save_due = self.interrupted or late or self.step == args.epochs * self.steps_per_epoch
        if some_unreadable:
            self.unreadable = sorted(union(self.unreadable))
        if len(self.unreadable) > self.MOST_UNREADABLE * len(source):
            raise Stop(f"{len(self.unreadable)} of {len(source)} images cannot be decoded, more than 1%, such as "
                       f"{', '.join(source.name(i) for i in self.unreadable[:3])}", 1)
        self.show(losses[-1], lr)
        return True

    def show(self, loss, lr):
        """The bar, with the rate of the last hundred steps: without compilation, evaluation and checkpoints."""
        size, now = self.args.batch_size, time.monotonic()
        self.seconds, self.resumed_at = self.seconds + now - self.resumed_at, now
        self.marks.append((self.step, self.seconds))
        postfix = f"loss {loss:.4f}, lr {lr:.2e}"
        if len(self.marks) > 1:
            rate = (self.step - self.marks[0][0]) * size / (self.seconds - self.marks[0][1])
            left = tqdm.format_interval((self.bar.total - self.step * size) / rate)
            postfix = f"{rate:,.0f} images/s, {left} left, {postfix}"
        self.bar.set_description(f"epoch {(self.step - 1) // self.steps_per_epoch + 1}/{self.args.epochs}", False)
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(self.step * size - self.bar.n)

    def log_epoch(self, **results):
        """Write the epoch's line to log.jsonl and TensorBoard, and show it but for what is a dictionary or empty: the
        mean loss, the results, the files that could not be decoded, the rate of training alone, and the seconds of all.
        JSON has no NaN: null stands for it.
        """
        taken = [loss for loss in self.losses if math.isfinite(loss)]
        images = (self.step - self.epoch_step) * self.args.batch_size
        entry = dict(epoch=self.epoch, step=self.step, loss=sum(taken) / max(len(taken), 1), **results,
                     dropped_steps=len(self.losses) - len(taken),
                     unreadable=sorted(self.source.name(i) for i in self.unreadable),
                     images_per_second=round(images / (self.seconds - self.epoch_seconds), 1),
                     seconds=round(time.monotonic() - self.epoch_at, 1))
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        if self.first:
            with writing(self.log.name):
                self.log.write((json.dumps(entry) + "\n").encode())
                self.log.flush()
            tqdm.write(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                                 for name, value in entry.items() if not isinstance(value, dict) and value != []),
                       file=sys.stderr)
        if self.tensorboard:
            for name, value in entry.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, self.epoch)
            self.tensorboard.flush()
        self.losses, self.unreadable, self.epoch_step, self.epoch_seconds = [], [], self.step, self.seconds
        self.epoch_at = time.monotonic()

    def save(self, name="last.pth", **checkpoint):
        """Write a checkpoint beside the old one, flush it, then put it in its place: whole or not at all."""
        if self.first:
            path = os.path.join(self.args.out, name)
            state = dict(step=self.step, images=len(self.source), losses=self.losses, unreadable=self.unreadable,
                         dropped_in_row=self.dropped_in_row)
            with writing(path), open(f"{path}.new", "wb") as file:
                torch.save(dict(checkpoint, run=state, args=vars(self.args), classes=self.classes), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.new", path)
        self.saved_at = time.monotonic()

    def continue_or_stop(self):
        """After all that came between two steps, which the rate of steps leaves out."""
        if self.interrupted:
            dist.barrier()  # torchrun ends all processes soon after one: the first has saved
            raise Stop(f"Interrupted at step {self.step}, which is saved: the same command continues", os.EX_TEMPFAIL)
        self.resumed_at = time.monotonic()

    def end(self, line):
        """The last line; "Done." only if this process trained."""
        self.bar.close()
        if self.first:
            print(f"{'Done.' if self.marks else 'Nothing is left to train.'} {line}")


def open_in(out, name):
    """Open a file in --out to add to it; both are made where they are not. Raises BadInput where they cannot be."""
    try:
        os.makedirs(out, exist_ok=True)
        return open(os.path.join(out, name), "a+b")
    except OSError as error:
        raise BadInput(f"cannot write to --out {out}: {error.strerror}") from None


@contextlib.contextmanager
def writing(path):
    """Ends the run with a sentence where a file cannot be written, and takes away what was begun beside it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            os.remove(f"{path}.new")
        raise Stop(f"Cannot write {path}: {cause.strerror or cause}. The last checkpoint is as it was", 1) from None


# ----------------------------------------------------------------------------------------------------------------------
# Processes, and how they end


def process():
    """(rank, number of processes) as torchrun gives them; (0, 1) without it, whatever is left of another's."""
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    check(given[0] is None or all(given), "RANK is set, but not all of WORLD_SIZE, MASTER_ADDR and MASTER_PORT: start "
                                          "several processes by torchrun, and one without these variables")
    return (int(given[0]), int(given[1])) if given[0] else (0, 1)


def start_processes(args):
    """Join the process group (NCCL on GPUs, gloo on CPUs). Returns this process's torch.device."""
    (rank, processes), cuda = process(), args.device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if processes > 1 else 0
    here, gpus = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", 1))), torch.cuda.device_count()
    check(not cuda or here <= gpus, f"--device cuda needs a GPU for each of {here} processes, and torch sees {gpus}: "
                                    f"start fewer, or use --device cpu")
    device = torch.device(args.device, local_rank if cuda else None)
    kernels(device)  # ARM_SCAN may ask for what is not there
    if cuda:
        torch.cuda.set_device(device)
    store = next(rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over its restarts: the addresses of the processes that have ended must not be found.
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=processes,
                            timeout=timedelta(minutes=10))
    return device


def union(mine):
    """The union of what the processes give."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, list(mine))
    return set().union(*lists)


def from_first_process(compute):
    """compute() is called on the first process alone; every process gets its result, or its BadInput."""
    box = [None]
    if process()[0] == 0:
        try:
            box = [compute()]
        except BadInput as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], BadInput):
        raise box[0]
    return box[0]


SHORT_OF_MEMORY = r"DataLoader worker \(pid|(?s:.*)(allocate memory|unable to (write to|allocate|open) .*torch_)"


def end_with_a_sentence(main):
    """Call main(). What the user can mend, and what ends all processes alike, is told in a sentence, once on each
    machine; all else with its traceback. No process is left behind.
    """
    code = 0
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        main()
        dist.destroy_process_group()
    except (BadInput, Stop) as error:
        sentence, code = error.args if isinstance(error, Stop) else (error, 2)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\n{sentence}.", file=sys.stderr)
        else:
            time.sleep(3)  # torchrun ends all processes as soon as one ends: let the first one speak
    except KeyboardInterrupt:
        code = os.EX_TEMPFAIL
    except Exception as error:  # SystemExit, of --help, passes
        code = 1
        if isinstance(error, (torch.OutOfMemoryError, MemoryError, EOFError)) or re.match(SHORT_OF_MEMORY, str(error)):
            print(f"\nProcess {os.environ.get('RANK', 0)}: out of memory, or a data loader worker died, often for want "
                  "of it: use fewer --workers, a larger --accum_steps, or --activation_checkpointing.", file=sys.stderr)
        else:
            traceback.print_exc()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not sys.exit, which would wait for processes that are gone and workers that do not end


# ----------------------------------------------------------------------------------------------------------------------
# The demonstration's images


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
        self.inside = distance < 0  # (n, size, size), where the shapes are
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


if __name__ == "__main__":
    end_with_a_sentence(main)
