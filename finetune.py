"""Finetune a pretrained ARM for recognition, in four scan directions; or train the same model from scratch; or evaluate
it (section 3.3; recipe: appendix of the ARM paper).

    torchrun --standalone --nproc_per_node 1 finetune.py                                             # demonstration
    torchrun --nproc_per_node 8 finetune.py --data /data/imagenet --init runs/pretrain/last.pth      # the paper's ARM-B
    torchrun --nproc_per_node 8 finetune.py --data /data/imagenet --eval runs/finetune/best.pth

--data holds train/CLASS/* and val/CLASS/*. The defaults are the paper's recipe. A run goes to --out (last.pth,
best.pth, log.jsonl); the same command continues it. Model and weight average (EMA) are evaluated after each epoch.
"""

import argparse
import csv
import json
import math
import os
import re
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from arm import MODELS, ARMClassifier, BadInput, check, load_weights, read_checkpoint
from pretrain import (MEAN, OF_SYSTEMS, Drawings, HelpFormatter, ImageFiles, Images, Run, add_machine_flags,
                      end_with_a_sentence, from_first_process, gather, learning_rate, list_images, load, mean_and_std,
                      normalize, optimizer_step, parameter_groups, parse_args, prepare, process, seed_of, shuffled,
                      start_processes)

RECIPES = {  # where the paper's recipe differs between models; it gives none for arm_huge, which takes arm_large's
    "arm_large": dict(layer_decay=0.75, drop_path=0.3),
    "arm_huge": dict(layer_decay=0.75, drop_path=0.3),
    "demo": dict(model="arm_tiny", image_size=48, patch_size=8, epochs=16, warmup_epochs=1, batch_size=16, blr=1.6e-2,
                 layer_decay=0.85, drop_path=0.0, ema_decay=0.95, mixup=0.0, cutmix=0.0, erasing=0.0, augment=0.0,
                 crop_scale=0.6, workers=0, compile=0, drawings=160, out="runs/demo_finetune"),
}


def get_args(**evaluated):
    """The arguments. Those of the checkpoint to evaluate, if any, are then defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--data", help="train/CLASS/* and val/CLASS/*. Without it, the demonstration")
    flag("--init", help="pretrained weights, a file or URL; without it, or with none, from scratch; the demonstration "
         "looks for its own pretraining first")
    flag("--eval", help="evaluate these weights, a file or URL, on val/, or on class folders in --data, and stop")
    flag("--predict", help="tell what these weights see in --data, an image or a folder of images, and stop")
    flag("--classes", help="names of the classes of --eval or --predict, where the file has none: a text, or a folder "
         "of class folders")
    flag("--real_labels", help="evaluate by ImageNet-ReaL's labels, its real.json")
    flag("--out", default="runs/finetune", help="where the run goes; one that is there is continued")
    flag("--model", choices=MODELS, default="arm_base", help="size")
    flag("--image_size", type=int, default=224, help="pixels")
    flag("--patch_size", type=int, default=16, help="pixels")
    flag("--pool", choices=["mean", "cls"], default="mean", help="what the classifier reads")
    flag("--directions", type=int, choices=[1, 2, 4], default=4, help="in which the encoder scans")
    # Optimisation
    flag("--epochs", type=int, default=100, help="passes over the images")
    flag("--warmup_epochs", type=float, default=5, help="in which the learning rate rises")
    flag("--batch_size", type=int, default=1024, help="of all processes together")
    flag("--blr", type=float, default=5e-4, help="peak learning rate for a batch of 256")
    flag("--min_lr", type=float, default=1e-6, help="learning rate at the end")
    flag("--layer_decay", type=float, default=0.65, help="of the learning rate, from layer to layer; 0: a linear probe")
    flag("--weight_decay", type=float, default=0.05, help="of matrices")
    flag("--ema_decay", type=float, default=0.99992, help="of the average of the weights; 0: no average")
    flag("--seed", type=int, default=0, help="of all random choices")
    # Regularisation
    flag("--drop_path", type=float, default=0.1, help="rate that stochastic depth rises to")
    flag("--smoothing", type=float, default=0.1, help="of the labels")
    flag("--mixup", type=float, default=0.8, help="alpha; 0 for none")
    flag("--cutmix", type=float, default=1.0, help="alpha; 0 for none")
    flag("--crop_scale", type=float, default=0.08, help="smallest share of an image that a crop shows")
    flag("--augment", type=float, default=9, help="magnitude of RandAugment; 0 for none")
    flag("--erasing", type=float, default=0.25, help="probability of random erasing")
    flag("--drawings", type=int, default=1, help="images of the demonstration")
    add_machine_flags(parser)
    parser.set_defaults(**evaluated)
    args = parse_args(parser, {**RECIPES, "demo": {**RECIPES["demo"], **evaluated}})
    check(args.data or not args.predict, "--predict needs --data, an image or a folder of images")
    for name in ("layer_decay", "ema_decay", "smoothing", "crop_scale", "erasing"):
        check(getattr(args, name) <= 1, f"--{name} is from 0 to 1, not {getattr(args, name)}")
    peak = args.blr * args.batch_size / 256
    check(args.eval or args.min_lr <= peak, f"--min_lr {args.min_lr:g} is above the peak learning rate, --blr x "
                                            f"--batch_size / 256 = {peak:g}")
    return args


def main():
    args = get_args()
    device = start_processes(args)
    if args.eval or args.predict:
        return evaluate_checkpoint(args.eval or args.predict, device)

    # Data
    if args.data:
        classes, *names = from_first_process(lambda: find_images(args.data))
        index = {name: i for i, name in enumerate(classes)}
        train, val = (ImageFiles(os.path.join(args.data, part), part_names, labels_of(part_names, index))
                      for part, part_names in zip(("train", "val"), names))
    else:
        train, val = Drawings(args.drawings, args.image_size, seed=1), Drawings(500, args.image_size, seed=2)
        classes = train.classes
    check(len(classes) > 1, f"{args.data}/train has one class alone, {classes[0]}: there is nothing to tell apart")
    train_set = Images(train, train_transform(args), args.seed)
    val_set = Images(val, eval_transform(args.image_size), replace=False)

    # Model
    torch.manual_seed(args.seed)
    model = ARMClassifier(args.image_size, args.patch_size, **MODELS[args.model], num_classes=len(classes),
                          drop_path=args.drop_path, pool=args.pool, directions=args.directions).to(device)
    if not args.data and not args.init and os.path.exists("runs/demo_pretrain/last.pth"):
        args.init = "runs/demo_pretrain/last.pth"
    args.init = args.init or "none"
    run = Run(args, model, train, device, classes)
    if args.init != "none" and not run.checkpoint:
        from_first_process(lambda: load_weights(model, args.init))  # the others receive them from DDP
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(group["lr_scale"] > 0)
    prepare(model, args)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    ema.update_parameters(model)  # the first call copies: the average starts from the initial weights
    prepare(ema.module, args)
    best = dict(top1=-1.0)
    if run.checkpoint:
        model.load_state_dict(run.checkpoint["model"])
        ema.module.load_state_dict(run.checkpoint["model_ema"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        best = run.checkpoint["best"]
    run.start(f"{args.model} from {'scratch' if args.init == 'none' else args.init}, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(val):,} validation images, "
              f"{len(classes)} classes")
    steps, span = args.epochs * run.steps_per_epoch, 1 / max(1 - args.ema_decay, 1e-9)
    if span > steps:
        run.say(f"The average of the weights spans {span:,.0f} steps, and the run has {steps:,}: look at the weights' "
                f"own accuracy, or give a smaller --ema_decay")

    # Training
    batches = load(train_set, shuffled(len(train), args, run.step), args.workers, device)
    mixes = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mix = v2.RandomChoice([kind(alpha=alpha, num_classes=len(classes)) for kind, alpha in mixes if alpha]
                          or [v2.Identity()])
    while run.step < steps:
        lr = learning_rate(run.step / run.steps_per_epoch, args, args.min_lr)
        torch.manual_seed(seed_of(args.seed, run.step, process()[0]))  # of mixing and stochastic depth
        step_loss = torch.zeros((), device=device)
        for micro_step in range(args.accum_steps):
            images, labels, unreadable = next(batches)
            images, targets = mix(normalize(images, device), labels.to(device, non_blocking=True))
            ddp.require_backward_grad_sync = micro_step == args.accum_steps - 1  # DDP adds gradients up in the last
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = ddp(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing) / args.accum_steps
            loss.backward()
            step_loss += loss.detach()
            run.unreadable += unreadable[unreadable >= 0].tolist()
        optimizer_step(ddp, optimizer, lr, step_loss)
        ema.update_parameters(model)

        if run.after_step(step_loss, lr):
            if run.epoch_ended:
                results, left_out = evaluate(model, val_set, torch.eye(len(classes)).bool(), args, device)
                ema_results, _ = evaluate(ema.module, val_set, torch.eye(len(classes)).bool(), args, device)
                run.log_epoch(lr=lr, **results, **{f"ema_{name}": value for name, value in ema_results.items()},
                              unreadable_val=[val.name(i) for i in left_out])
                for name, found in (("the weights", results), ("their average", ema_results)):
                    if found["top1"] > best["top1"]:
                        best = dict(top1=found["top1"], of=name, epoch=run.epoch)
            if run.epoch_ended or run.save_due:
                weights = dict(model=model.state_dict(), model_ema=ema.module.state_dict(), best=best)
                if run.epoch_ended and best.get("epoch") == run.epoch:
                    run.save("best.pth", **weights)
                run.save(**weights, optimizer=optimizer.state_dict())
            run.stop_if_interrupted()
    run.end(f"The best top-1 accuracy was {best['top1']:.2f}% (chance: {100 / len(classes):.3g}%), of "
            f"{best['of']} after epoch {best['epoch']}: {args.out}/best.pth; every epoch's results in "
            f"{args.out}/log.jsonl.")


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, dataset, right, args, device, among=None):
    """Top-1 and, of more than five classes, top-5 accuracy in percent and the mean cross-entropy, over every image once
    on any number of processes. Images that cannot be decoded are left out. Returns (results, indices left out).

    right: (labels, classes), true where a class of the model's is right for a label of the data's; among: (classes,),
    true for those that predictions are taken from, by default those that are right for any label.
    """
    right, among = right.to(device), (right.any(dim=0) if among is None else among).to(device)
    totals, left_out = torch.zeros(4, dtype=torch.float64, device=device), []
    model.eval()
    for _, (images, labels, unreadable) in evaluation_batches(dataset, args, device):
        left_out += unreadable[unreadable >= 0].tolist()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(normalize(images, device)).float()  # (B, classes)
        readable = labels.to(device, non_blocking=True) >= 0
        logits = logits[readable].masked_fill(~among, -math.inf)
        its_right = right[labels.to(device)[readable]]  # (B, classes)
        hit = its_right.gather(1, logits.topk(min(5, logits.shape[1])).indices)  # (B, 5)
        loss = -logits.log_softmax(dim=1).masked_fill(~its_right, -math.inf).logsumexp(dim=1)
        totals += torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum(), loss.sum(), readable.sum()])
    model.train()
    dist.all_reduce(totals)
    top1, top5, loss, count = totals.tolist()
    top5 = dict(top5=100 * top5 / max(count, 1)) if among.sum() > 5 else {}
    return dict(top1=100 * top1 / max(count, 1), **top5, val_loss=loss / max(count, 1)), sorted(gather(left_out))


def evaluation_batches(dataset, args, device):
    """This process's share of a data set: its keys and its images, batch by batch."""
    rank, processes = process()
    mine = [(0, i) for i in range(rank, len(dataset), processes)]
    size = max(64, args.batch_size // (processes * args.accum_steps))  # without gradients these fit, and fewer are slow
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    return zip(batches, tqdm(load(dataset, batches, args.workers, device), "evaluating", len(batches), leave=False,
                             disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 10))


def evaluate_checkpoint(path, device):
    """Print the accuracy of a checkpoint's weights and, where it has one, of their average; or, to --predict, what
    classes they see in images without labels.
    """
    made = from_first_process(lambda: describe(path))
    args = get_args(**made["sizes"])
    model = ARMClassifier(args.image_size, args.patch_size, **MODELS[args.model], num_classes=made["num_classes"],
                          pool=args.pool, directions=args.directions).to(device)
    prepare(model, args)
    classes = from_first_process(lambda: read_classes(args.classes)) if args.classes else made["classes"]
    check(classes is None or len(classes) == made["num_classes"], f"{args.classes} names {len(classes or [])} classes, "
                                                                  f"and {path} has {made['num_classes']}")
    if args.predict:
        load_everywhere(model, path, made["best_is_ema"])
        return predict(model, classes or range(made["num_classes"]), args, device)
    source, right, among, protocol = validation_images(args, classes, made["num_classes"])
    dataset = Images(source, eval_transform(args.image_size), replace=False)
    for ema in (False, True) if made["has_ema"] else (False,):
        load_everywhere(model, path, ema)
        started = time.monotonic()
        results, left_out = evaluate(model, dataset, right, args, device, among)
        speed = len(dataset) / (time.monotonic() - started)
        if process()[0] == 0:
            top5 = f"top-5 {results['top5']:.2f}%, " if "top5" in results else ""
            print(f"{'EMA' if ema else 'Model'}: top-1 {results['top1']:.2f}%, {top5}loss {results['val_loss']:.4f} "
                  f"over {len(dataset) - len(left_out):,} images, {protocol}; {speed:,.0f} images/s")
    if process()[0] == 0:
        for i in left_out:
            print(f"Cannot decode {source.name(i)}: it is left out.")


def load_everywhere(model, path, ema):
    """load_weights on the first process, from which the others receive them."""
    check("head" not in from_first_process(lambda: load_weights(model, path, ema)), f"{path} has no classifier")
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)


def describe(path):
    """What a checkpoint tells of itself: the arguments of ours that size its model, its classes (None if it names none)
    and their number, and whether it holds an average of the weights and did best by it.
    """
    found = read_checkpoint(path)
    made, weights = found.get("args"), found.get("model", found)
    head = next((v for k, v in weights.items() if str(k).endswith("head.weight")), None)
    check(head is not None, f"{path} has no classifier: --eval and --predict take what finetuning has made")
    known = isinstance(made, dict) and made.get("model") in MODELS
    names = ("model", "image_size", "patch_size", "pool", "directions")
    sizes = {name: made[name] for name in names if known and name in made}
    return dict(sizes=sizes, classes=found.get("classes"), num_classes=len(head), has_ema="model_ema" in found,
                best_is_ema="model_ema" in found and found.get("best", {}).get("of") == "their average")


def read_classes(file_or_folder):
    """The names of a checkpoint's classes in their order: the lines of a text, or the folders in a folder, sorted."""
    check(os.path.exists(file_or_folder), f"there is no {file_or_folder}: --classes takes a text with a name a line, "
                                          f"or a folder of class folders")
    if os.path.isdir(file_or_folder):
        return in_order(f.name for f in os.scandir(file_or_folder)
                        if f.is_dir() and f.name[0] != "." and f.name not in OF_SYSTEMS)
    with open(file_or_folder, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [line.strip() for line in file if line.strip()]


def validation_images(args, classes, num_classes):
    """The images of --data, in class folders that stand in val/ or in the folder itself, and how to count them:
    (source, right, among) as evaluate takes them, and that protocol in words.
    """
    everything = torch.eye(num_classes, dtype=torch.bool)
    if not args.data:
        return Drawings(500, args.image_size, seed=2), everything, None, f"{num_classes} classes"
    folder = os.path.join(args.data, "val")
    folder = folder if os.path.isdir(folder) else args.data
    names = from_first_process(lambda: list_images(folder))
    if args.real_labels:
        names, right = from_first_process(lambda: read_real_labels(args.real_labels, names, num_classes))
        return ImageFiles(folder, names, range(len(names))), right, everything[0] | True, "by their ReaL labels"
    its_own = classes_of(names, folder)
    train = os.path.join(args.data, "train")  # of whose classes val/ may have a part
    beside = read_classes(train) if os.path.isdir(train) else []
    choice = in_order({*its_own, *(name for name in beside if not classes or name in classes)})
    index = dict(zip(choice, class_indices(choice, classes, num_classes)))
    among = torch.zeros(num_classes, dtype=torch.bool).index_fill(0, torch.tensor([*index.values()]), True)
    protocol = f"{num_classes:,} classes"
    if not among.all():
        protocol = f"of {len(choice):,} of {protocol}, from which predictions are taken"
    return ImageFiles(folder, names, labels_of(names, index)), everything, among, protocol


def class_indices(names, classes, num_classes):
    """Which of a checkpoint's classes the folders `names` hold: by name where it names them, else by place where they
    are as many, else by number (ImageNet-V2's folders are 0 to 999). Raises BadInput where none of this will do.
    """
    if classes and any(name in classes for name in names):
        unknown = next((name for name in names if name not in classes), None)
        check(unknown is None, f"the folder {unknown} is none of the {num_classes} classes of the checkpoint")
        return [classes.index(name) for name in names]
    if len(names) == num_classes and (not classes or all(name.isdecimal() for name in names)):
        return range(num_classes)
    check(all(name.isdecimal() and int(name) < num_classes for name in names), f"the checkpoint has {num_classes} "
          f"classes{', such as ' + classes[0] if classes else ''}, the images are of {len(names)}, such as {names[0]}"
          + ("" if classes else ": give the names of its classes in their order by --classes FILE_OR_FOLDER"))
    return [int(name) for name in names]


def read_real_labels(path, names, num_classes):
    """ImageNet-ReaL (Beyer et al., 2020): a list of the classes right for each of ILSVRC2012_val_00000001..50000.
    Returns those of the images that have any, and right: (images, classes).
    """
    numbers = [re.search(r"ILSVRC2012_val_(\d+)\.", name) for name in names]
    check(all(numbers), "--real_labels is for ImageNet's validation images, of names such as "
                        "ILSVRC2012_val_00000001.JPEG")
    try:
        with open(path) as file:
            labels = json.load(file)
        right = torch.zeros(len(names), num_classes, dtype=torch.bool)
        for i, number in enumerate(numbers):
            right[i, labels[int(number[1]) - 1]] = True
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(f"cannot read --real_labels {path} for {num_classes} classes: {error}") from None
    known = right.any(dim=1)
    return [name for name, counts in zip(names, known.tolist()) if counts], right[known]


@torch.no_grad()
def predict(model, classes, args, device):
    """The five classes that an image most likely is of, with their probabilities: of one image on the screen, of the
    images in a folder as --out/predictions.csv.
    """
    one = os.path.isfile(args.data)
    folder, name = os.path.split(args.data) if one else (args.data, "")
    names = [name] if one else from_first_process(lambda: list_images(folder))
    dataset = Images(ImageFiles(folder, names), eval_transform(args.image_size), replace=False)
    rows = []
    model.eval()
    for keys, (images, _, unreadable) in evaluation_batches(dataset, args, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = model(normalize(images, device)).float().softmax(dim=1).topk(min(5, len(classes)))
        for (_, i), bad, best, shares in zip(keys, unreadable.tolist(), found.indices.tolist(), found.values.tolist()):
            row = [f"{value}" for k, share in zip(best, shares) for value in (classes[k], f"{share:.4f}")]
            rows.append((i, *(row if bad < 0 else ["cannot be decoded"])))
    rows = [[dataset.source.name(i), *row] for i, *row in sorted(gather(rows))]
    if process()[0] > 0:
        return
    if one:
        _, *row = rows[0]
        print(", ".join(f"{name} {float(share):.1%}" for name, share in zip(row[::2], row[1::2])) or row[0])
        return
    path = os.path.join(args.out, "predictions.csv")
    os.makedirs(args.out, exist_ok=True)
    with open(path, "w", newline="", errors="surrogateescape") as file:
        header = (f"{what}_{k}" for k in range(1, 1 + min(5, len(classes))) for what in ("class", "probability"))
        csv.writer(file).writerows([["image", *header], *rows])
    print(f"{len(rows):,} images: {path}")


# ----------------------------------------------------------------------------------------------------------------------
# Images, and their augmentation


def find_images(folder, evaluate_only=False):
    """The classes and the image names of train/ and val/ below a folder: (classes, train names, val names). Classes are
    the folders of train/. Raises BadInput where a folder is missing or empty, or val/ has a class that train/ has not.
    """
    train, val = (list_images(os.path.join(folder, part)) for part in ("train", "val"))
    classes = classes_of(train, os.path.join(folder, "train"))
    of_val = classes_of(val, os.path.join(folder, "val"))
    unknown = sorted({*of_val} - {*classes})
    check(not unknown, f"{folder}/val has {len(unknown)} classes that {folder}/train has not, such as "
                       f"{', '.join(unknown[:1])}: a class needs training images")
    return classes, train, val


def classes_of(names, folder):
    """The class folders that images stand in, in order. Raises BadInput for an image that stands in none."""
    loose = next((name for name in names if os.sep not in name), None)
    check(not loose, f"{folder}/{loose} is in no class: images belong in {folder}/CLASS/")
    return in_order({name.split(os.sep)[0] for name in names})


def in_order(classes):
    """Sorted, as numbers where all are: 2 before 10."""
    classes = sorted(classes)
    return sorted(classes, key=int if all(name.isdecimal() for name in classes) else None)


def labels_of(names, index):
    """The label of each image: the index of the folder that it stands in."""
    return [index[name.split(os.sep)[0]] for name in names]


def train_transform(args):
    """The recipe's augmentation of one image, uint8 to uint8; Mixup and CutMix follow on the batch."""
    crop = v2.RandomResizedCrop(args.image_size, scale=(args.crop_scale, 1), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *([RandAugment(args.augment)] if args.augment else []),
                       *([RandomErasing(args.erasing)] if args.erasing else [])])


def eval_transform(image_size):
    """Resize the shorter side and crop the centre: 256 and 224, in this ratio up to 384; from there, no margin."""
    shorter_side = image_size * 256 // 224 if image_size < 384 else image_size
    return v2.Compose([v2.Lambda(cut_strip, torch.Tensor),
                       v2.Resize(shorter_side, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(image_size)])


def cut_strip(image):
    """The middle of a strip, (3, H, W): what no centre crop shows need not be resized, and can be very much."""
    most = 4 * min(image.shape[1:])
    return v2.functional.center_crop(image, [min(side, most) for side in image.shape[1:]])


GREY = tuple(round(255 * mean) for mean in MEAN)


def affine(image, b=0.0, c=0.0, d=0.0, f=0.0):
    """Each pixel (x, y) of a PIL image from (x + b y + c, d x + y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (1, b, c, d, 1, f), Image.Resampling.BICUBIC,
                           fillcolor=GREY)


class RandAugment(v2.Transform):
    """RandAugment as MAE finetunes (timm's rand-m9-mstd0.5-inc1): two operations, each applied with probability 0.5, at
    a strength drawn from a normal distribution.
    """

    OPERATIONS = {  # of a PIL image, at a strength m from 0 to 1
        "AutoContrast": lambda x, m: ImageOps.autocontrast(x),
        "Equalize": lambda x, m: ImageOps.equalize(x),
        "Invert": lambda x, m: ImageOps.invert(x),
        "Posterize": lambda x, m: x.point([i & ~(255 >> (4 - int(4 * m))) for i in range(256)] * 3),
        "Solarize": lambda x, m: ImageOps.solarize(x, 256 - int(256 * m)),
        "SolarizeAdd": lambda x, m: x.point([min(255, i + int(110 * m)) if i < 128 else i for i in range(256)] * 3),
        "Rotate": lambda x, m: x.rotate(30 * m, Image.Resampling.BICUBIC, fillcolor=GREY),
        "Color": lambda x, m: ImageEnhance.Color(x).enhance(1 + 0.9 * m),
        "Contrast": lambda x, m: ImageEnhance.Contrast(x).enhance(1 + 0.9 * m),
        "Brightness": lambda x, m: ImageEnhance.Brightness(x).enhance(1 + 0.9 * m),
        "Sharpness": lambda x, m: ImageEnhance.Sharpness(x).enhance(1 + 0.9 * m),
        "ShearX": lambda x, m: affine(x, b=0.3 * m),
        "ShearY": lambda x, m: affine(x, d=0.3 * m),
        "TranslateX": lambda x, m: affine(x, c=0.45 * m * x.width),
        "TranslateY": lambda x, m: affine(x, f=0.45 * m * x.height),
    }
    ONE_SIGN = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")  # others take -m, too

    def __init__(self, magnitude):
        super().__init__()
        self.magnitude = magnitude

    def make_params(self, flat_inputs):
        """The operations to apply, as (name, strength)."""
        chosen = []
        for i in torch.randint(len(self.OPERATIONS), (2,))[torch.rand(2) < 0.5].tolist():
            name = [*self.OPERATIONS][i]
            strength = min(max((self.magnitude + 0.5 * torch.randn(()).item()) / 10, 0.0), 1.0)
            chosen.append((name, strength if name in self.ONE_SIGN or torch.rand(()) < 0.5 else -strength))
        return dict(chosen=chosen)

    def transform(self, image, params):
        """image: uint8 (3, H, W) -> the same. Inside it is a PIL image: torchvision warps no tensor bicubically."""
        pil = v2.functional.to_pil_image(image)
        for name, strength in params["chosen"]:
            pil = self.OPERATIONS[name](pil, strength)
        return v2.functional.pil_to_tensor(pil)


class RandomErasing(v2.RandomErasing):
    """torchvision's random erasing with pixel noise, on uint8 images: the noise is normal once they are normalised,
    and clipped to the range of a pixel.
    """

    def __init__(self, p):
        super().__init__(p=p, value="random")

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            mean, std = mean_and_std(torch.device("cpu"))
            noise = torch.randn(3, params["h"], params["w"]) * std + mean
            params["v"] = (noise * 255).round().clamp(0, 255).byte()
        return params


if __name__ == "__main__":
    end_with_a_sentence(main)
