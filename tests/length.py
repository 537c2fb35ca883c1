"""Does it pay to pretrain for longer? CIFAR-10 at 96x96 in patches of 8, an arm_small, no other images.

    python tests/length.py cifar10 runs/length --choose     # which augmentation, by a tenth of train/, held out
    python tests/length.py cifar10 runs/length --augmentation middle

Pretraining reads all of train/, without labels; finetuning nine tenths of it; both commands share their runs. The
second one pretrains for 20, 60 and 200 epochs, each with a schedule of its own, and finetunes from each end; beside
these stand masked prediction (MAE) for as many epochs, the same finetuning from scratch, and from scratch for as many
GPU seconds as each of them took in all. Each pretrained encoder is also probed as it is: by a linear classifier and the
nearest neighbours of its features. It prints the accuracies on val/ as a table and draws OUT/length.png, for which
matplotlib is needed.

It runs the two scripts on all GPUs, each run on --gpus of them, --jobs runs side by side. After --minutes, or stopped,
it waits until all have saved; the same command continues them, and what has ended is not run again.
"""

import argparse
import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from arm import ARM, MAE, MODELS, load_weights  # noqa: E402
from finetune import ClassFiles, eval_transform  # noqa: E402
from pretrain import Samples, load, normalize  # noqa: E402

SIZES = ["--image_size", 96, "--patch_size", 8]  # the paper's geometry: 12x12 patches, 3x3 clusters
FINETUNE = ["--layer_decay", 0.85, "--ema_decay", 0, "--eval_every", 5]
AUGMENTATIONS = {
    "middle": ["--augment", 9, "--erasing", 0.25, "--mixup", 0, "--cutmix", 0, "--drop_path", 0.1, "--crop_scale", 0.4],
    "strong": ["--augment", 9, "--erasing", 0.25, "--mixup", 0.8, "--cutmix", 1, "--drop_path", 0.1, "--crop_scale",
               0.4],
}


processes, stopped = set(), threading.Event()  # the scripts that run; whether they are to stop


class Stopped(Exception):
    """A run was interrupted, and has saved."""


def run(script, gpus, data, folder, epochs, args, *flags):
    """Run a script to its end on these GPUs, unless it has been there. Raises Stopped where it is not to go on."""
    if len(log(folder)) >= epochs:
        return
    launcher = [sys.executable]
    if len(gpus) > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", len(gpus)]
    command = [*launcher, ROOT / f"{script}.py", "--data", data, "--model", args.model, *SIZES, "--batch_size",
               args.batch_size, "--blr", 1e-3, "--epochs", epochs, "--warmup_epochs", min(5, epochs / 10), "--workers",
               args.workers, "--compile", args.compile, "--out", folder, *flags]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        if stopped.is_set():
            raise Stopped
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=dict(
            os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=",".join(map(str, gpus))))
        processes.add(process)
        if stopped.is_set():  # in between
            process.terminate()
        code = process.wait()
        processes.remove(process)
    if len(log(folder)) < epochs:
        if stopped.is_set():
            raise Stopped
        raise RuntimeError(f"{script}.py ended with {code}: see {folder}/output.txt")


def stop(*_):
    stopped.set()
    for process in list(processes):
        process.terminate()


def run_all(jobs, args):
    """Call job(gpus) for each of the jobs, the first ones first, on the GPUs that are free."""
    count, free = torch.cuda.device_count(), queue.Queue()
    for first in range(0, max(1, count), args.gpus):
        for _ in range(args.jobs):
            free.put([*range(first, min(first + args.gpus, max(1, count)))])

    def one(job):
        gpus = free.get()
        try:
            job(gpus)
        except Stopped:
            pass
        finally:
            free.put(gpus)

    with ThreadPoolExecutor(free.qsize()) as pool:
        list(pool.map(one, jobs))


def log(folder):
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def as_long(n, args):
    """Epochs of finetuning from scratch that take as many GPU seconds as n epochs of pretraining and the finetuning."""
    return args.finetune_epochs + round(args.cost * n)


def rows(args):
    """What is compared: name: (objective of pretraining or None, its epochs, epochs of finetuning)."""
    longest = max(args.points)
    return {
        **{f"ARM, {n} epochs": ("arm", n, args.finetune_epochs) for n in sorted(args.points, reverse=True)},
        f"MAE, {longest} epochs": ("mae", longest, args.finetune_epochs),
        **{f"from scratch, {as_long(n, args)} epochs": (None, 0, as_long(n, args)) for n in sorted([0, *args.points])},
    }


def places(args, row, seed):
    """The folders of a row's pretraining and finetuning."""
    objective, n, epochs = rows(args)[row]
    seed = args.out / f"seed{seed}"
    name = f"{objective}{n}" if objective else "scratch"
    return seed / name / "pretrain", seed / f"{name}" / f"finetune{epochs}_{args.augmentation}"


def pretrain(args, row, seed, gpus):
    objective, n, _ = rows(args)[row]
    if objective:
        run("pretrain", gpus, args.data, places(args, row, seed)[0], n, args, "--objective", objective, "--seed", seed)


def work(args, row, seed, gpus):
    pretrain(args, row, seed, gpus)
    objective, _, epochs = rows(args)[row]
    pretrained, finetuned = places(args, row, seed)
    init = pretrained / "last.pth" if objective else "none"
    run("finetune", gpus, args.nine_tenths, finetuned, epochs, args, *FINETUNE, *AUGMENTATIONS[args.augmentation],
        "--init", init, "--seed", seed)
    print(f"seed {seed}, {row}, {args.augmentation}: {top1(finetuned, epochs):.2f}%", file=sys.stderr, flush=True)


def top1(folder, epochs):
    """After the last epoch, in percent; None where it has not come to it."""
    return next((entry["top1"] for entry in log(folder) if entry["epoch"] == epochs), None)


# ----------------------------------------------------------------------------------------------------------------------
# Probes


def read_all(folder, workers):
    """All images of a folder of classes, uint8 (images, 3, 96, 96), and their labels."""
    source = ClassFiles(str(folder))
    keys = [[(0, i) for i in range(start, min(start + 500, len(source)))] for start in range(0, len(source), 500)]
    batches = [*load(Samples(source, eval_transform(96)), keys, workers, torch.device("cpu"))]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def pretrained_model(checkpoint, objective, args):
    torch.manual_seed(0)
    width, kind = MODELS[args.model]["dim"], dict(arm=ARM, mae=MAE)[objective]
    model = kind(96, 8, **MODELS[args.model], decoder_dim=min(512, width)).eval()
    if checkpoint:
        with contextlib.redirect_stdout(sys.stderr):
            load_weights(model, checkpoint)
    return model


@torch.no_grad()
def features(model, images, device):
    """The mean over an image's patches of what the encoder makes of them, (images, d)."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return torch.cat([model.features(normalize(part, device)).float().mean(dim=(1, 2))
                          for part in images.split(500)])


def nearest_neighbours(train, labels, val, val_labels, k=20):
    """Top-1 accuracy in percent of the k nearest of the training features by cosine, weighted by exp(cosine / 0.07)."""
    train, val = F.normalize(train), F.normalize(val)
    right = 0
    for part, its_labels in zip(val.split(1000), val_labels.split(1000)):
        cosine, nearest = (part @ train.T).topk(min(k, len(train)), dim=1)  # (images, k)
        votes = F.one_hot(labels[nearest], int(labels.max()) + 1) * (cosine / 0.07).exp()[..., None]
        right += (votes.sum(dim=1).argmax(dim=1) == its_labels).sum().item()
    return 100 * right / len(val)


def linear_probe(train, labels, val, val_labels):
    """Top-1 accuracy in percent of a logistic regression on features of mean 0 and spread 1."""
    mean, spread = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, val = (train - mean) / spread, (val - mean) / spread
    head = nn.Linear(train.shape[1], int(labels.max()) + 1, device=train.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(head(train), labels) + 1e-4 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return 100 * (head(val).argmax(dim=1) == val_labels).float().mean().item()


def probe_all(args):
    """Probe every pretrained encoder that has not been, and one that is not pretrained; to probes.json of each."""
    device, data = torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
    for seed in range(args.seeds):
        for row, (objective, n, _) in rows(args).items():
            pretrained = places(args, row, seed)[0]
            path = pretrained.parent / "probes.json"
            if path.exists() or len(log(pretrained)) < n:
                continue
            if data is None:
                images, labels = read_all(args.data / "train", args.workers * args.jobs)
                val, val_labels = read_all(args.data / "val", args.workers * args.jobs)
                data = images, labels.to(device), val, val_labels.to(device)
            images, labels, val, val_labels = data
            model = pretrained_model(pretrained / "last.pth" if objective else None, objective or "arm", args)
            train, val = (features(model.to(device), part, device) for part in (images, val))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(knn=nearest_neighbours(train, labels, val, val_labels),
                                            linear=linear_probe(train, labels, val, val_labels))))


def probes(args, row, seed):
    path = places(args, row, seed)[0].parent / "probes.json"
    return json.loads(path.read_text()) if path.exists() else {}


# ----------------------------------------------------------------------------------------------------------------------
# What comes out


def print_table(args):
    print("| | finetuned: " + " | ".join(f"seed {seed}" for seed in range(args.seeds)) + " | linear probe | k-NN | "
          "minutes |\n" + "| --- " * (args.seeds + 4) + "|")
    for row, (_, n, epochs) in rows(args).items():
        tops = [top1(places(args, row, seed)[1], epochs) for seed in range(args.seeds)]
        tops = ["" if top is None else f"{top:.2f}%" for top in tops]
        found = [f"{value:.1f}%" if value is not None else "" for value in
                 (probes(args, row, 0).get(name) for name in ("linear", "knn"))]
        minutes = sum(entry["seconds"] for folder in places(args, row, 0) for entry in log(folder)) / 60
        print(f"| {row} | {' | '.join(tops)} | {' | '.join(found)} | {minutes:.1f} |")


def draw(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    mae = f"MAE, {max(args.points)} epochs"
    scratch = {n: f"from scratch, {as_long(n, args)} epochs" for n in sorted([0, *args.points])}
    arm = {n: f"ARM, {n} epochs" if n else scratch[0] for n in scratch}

    def line(ax, found, name, seed, **style):
        """A point for each n of which a value has been found; only those of the first seed are named."""
        found = {n: value for n, value in found.items() if value is not None}
        if found:
            ax.plot([*found], [*found.values()], label=name if seed == 0 else None, alpha=1 / (1 + seed), **style)

    for seed in range(args.seeds):
        def finetuned(row):
            return top1(places(args, row, seed)[1], rows(args)[row][2])

        line(axes[0], {n: finetuned(row) for n, row in arm.items()}, f"ARM, then {args.finetune_epochs} epochs", seed,
             marker="o", color="C0")
        line(axes[0], {n: finetuned(row) for n, row in scratch.items()}, "from scratch, for as many GPU seconds", seed,
             marker="o", color="C2")
        line(axes[0], {max(args.points): finetuned(mae)}, "MAE", seed, marker="x", color="C0", linestyle="")
        for kind, name, color in (("linear", "linear probe", "C0"), ("knn", "20 nearest neighbours", "C3")):
            line(axes[1], {n: probes(args, row, seed).get(kind) for n, row in arm.items()}, name, seed, marker="o",
                 color=color)
            line(axes[1], {max(args.points): probes(args, mae, seed).get(kind)}, f"{name} after MAE", seed, marker="x",
                 color=color, linestyle="")
    axes[0].set(title="Finetuned: top-1 accuracy, %")
    axes[1].set(title="As pretrained: top-1 accuracy, %")
    for ax in axes:
        ax.set_xlabel("epochs of pretraining")
        ax.set_xticks([0, *args.points])
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out / "length.png", dpi=110)


# ----------------------------------------------------------------------------------------------------------------------


def hold_out(data, folder):
    """Folders of links: train/ has nine of ten images of each class in data/train, held_out/ the tenth, val/ is data's.
    """
    for of_class in sorted((data / "train").iterdir()):
        for i, image in enumerate(sorted(of_class.iterdir())):
            link = folder / ("held_out" if i % 10 == 0 else "train") / of_class.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(image.resolve())
    if not (folder / "val").is_symlink():
        (folder / "val").symlink_to((data / "val").resolve())
    return folder


def choose(args):
    """Finetune with each augmentation after the shortest pretraining; print what each makes of the images held out."""
    row = f"ARM, {min(args.points)} epochs"
    run_all([lambda gpus: pretrain(args, row, 0, gpus)], args)
    kinds = [argparse.Namespace(**dict(vars(args), augmentation=name)) for name in AUGMENTATIONS]
    run_all([functools.partial(work, kind, row, 0) for kind in kinds], args)
    for kind in kinds:
        finetuned, found = places(kind, row, 0)[1], "not yet"
        if top1(finetuned, args.finetune_epochs) is not None:
            command = [sys.executable, ROOT / "finetune.py", "--eval", finetuned / "last.pth", "--data",
                       args.nine_tenths / "held_out"]
            found = subprocess.run(list(map(str, command)), capture_output=True, text=True).stdout.strip()
        print(f"{kind.augmentation}, images held out: {found}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("data", type=Path, help="train/CLASS/* and val/CLASS/*")
    flag("out", type=Path)
    flag("--choose", action="store_true", help="try each augmentation, by the images held out")
    flag("--augmentation", choices=AUGMENTATIONS, default="middle")
    flag("--points", type=int, nargs="*", default=[20, 60, 200], help="epochs of pretraining")
    flag("--finetune_epochs", type=int, default=30)
    flag("--cost", type=float, default=0.68, help="GPU seconds of an epoch of pretraining, in epochs of finetuning")
    flag("--seeds", type=int, default=1)
    flag("--model", choices=MODELS, default="arm_small")
    flag("--batch_size", type=int, default=512)
    flag("--compile", type=int, choices=[0, 1], default=int(torch.cuda.is_available()))
    flag("--gpus", type=int, default=1, help="of each run")
    flag("--jobs", type=int, default=1, help="runs side by side on these")
    flag("--workers", type=int, default=15, help="loader processes for each GPU of a run")
    flag("--minutes", type=float, default=1e4, help="after which to stop")
    args = parser.parse_args()
    args.nine_tenths = hold_out(args.data, args.out / "nine_tenths")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    timer = threading.Timer(60 * args.minutes, stop)
    timer.daemon = True  # the end does not wait for it
    timer.start()
    if args.choose:
        choose(args)
    else:
        jobs = [(seed, row) for seed in range(args.seeds) for row in rows(args)]
        jobs.sort(key=lambda job: -args.cost * rows(args)[job[1]][1] - rows(args)[job[1]][2])  # the longest first
        run_all([functools.partial(work, args, row, seed) for seed, row in jobs], args)
        if not stopped.is_set():
            probe_all(args)
        print_table(args)
        draw(args)
    if stopped.is_set():
        print("Stopped: the same command continues.")
        sys.exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    main()
