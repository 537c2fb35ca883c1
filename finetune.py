"""Finetune a pretrained ARM, in four scan directions, for recognition, object detection or segmentation; or train the
same model from scratch; or evaluate it (section 3.3; recipe for recognition: appendix of the ARM paper).

    python finetune.py                                                                               # demonstration
    torchrun --nproc_per_node 8 finetune.py --data /data/imagenet --init runs/pretrain/last.pth      # the paper's ARM-B
    torchrun --nproc_per_node 8 finetune.py --data /data/imagenet --eval runs/finetune/best.pth
    torchrun --nproc_per_node 8 finetune.py --task detect --data /data/coco --init runs/pretrain/last.pth
    torchrun --nproc_per_node 8 finetune.py --task segment --data /data/ade20k --init runs/pretrain/last.pth

--data holds train/CLASS/* and val/CLASS/*; or COCO's train2017/, val2017/ and annotations/; or ADE20K's images/ and
annotations/. The defaults are the paper's recipe, for recognition. A run goes to --out (last.pth, best.pth, log.jsonl;
predictions.png of the other tasks); the same command continues it. Model and weight average (EMA) are evaluated
every --eval_every epochs. Each task has a chapter below; none needs the others.
"""

import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import tv_tensors
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image, masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image
from tqdm import tqdm

from arm import MODELS, ARMClassifier, ARMDetector, ARMSegmenter, BadInput, check, load_weights, read_checkpoint
from pretrain import (MEAN, OF_SYSTEMS, Drawings, ImageFiles, Images, Run, end_with_a_sentence, from_first_process,
                      learning_rate, list_images, load, make_parser, mean_and_std, normalize, open_in, optimizer_step,
                      parameter_groups, parse_args, prepare, process, seed_of, shuffled, start_processes, union,
                      writing)

RECIPES = {  # where the paper's recipe differs between models; it gives none for arm_huge, which takes arm_large's
    "arm_large": dict(layer_decay=0.75, drop_path=0.3),
    "arm_huge": dict(layer_decay=0.75, drop_path=0.3),
    "demo": dict(model="arm_tiny", image_size=48, patch_size=8, epochs=16, warmup_epochs=1, eval_every=4, batch_size=16,
                 blr=1.6e-2, layer_decay=0.85, drop_path=0.0, ema_decay=0.95, mixup=0.0, cutmix=0.0, erasing=0.0,
                 augment=0.0, crop_scale=0.6, workers=0, compile=0, out="runs/demo_finetune"),
}


def get_args(**evaluated):
    """The arguments. Those of the checkpoint to evaluate, if any, are then defaults."""
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--task", choices=["classify", "detect", "segment"], default="classify", help="which head to train")
    flag("--data", help="the folder of images and their classes or annotations. Without it, the demonstration")
    flag("--init", help="pretrained weights, a file or URL, or none; by default none, or the demonstration's own")
    flag("--eval", help="evaluate these weights, a file or URL, on val/, or on class folders in --data, and stop")
    flag("--predict", help="tell what these weights see in --data, an image or a folder of images, and stop")
    flag("--classes", help="names of these weights' classes, where they have none: a text, or a folder of folders")
    flag("--real_labels", help="evaluate by ImageNet-ReaL's labels, its real.json")
    flag("--out", default="runs/finetune", help="where the run goes; one that is there is continued")
    flag("--model", choices=MODELS, default="arm_base", help="size of the encoder")
    flag("--image_size", type=int, default=224, help="pixels")
    flag("--patch_size", type=int, default=16, help="pixels")
    flag("--pool", choices=["mean", "cls"], default="mean", help="what the classifier reads")
    flag("--directions", type=int, choices=[1, 2, 4], default=4, help="in which the encoder scans")
    # Optimisation
    flag("--epochs", type=int, default=100, help="passes over the images")
    flag("--warmup_epochs", type=float, default=5, help="epochs in which the learning rate rises")
    flag("--batch_size", type=int, default=1024, help="of all processes together")
    flag("--blr", type=float, default=5e-4, help="peak learning rate for a batch of 256")
    flag("--min_lr", type=float, default=1e-6, help="learning rate at the end")
    flag("--schedule", choices=["cosine", "line", "steps"], default="cosine", help="how the learning rate falls")
    flag("--layer_decay", type=float, default=0.65, help="of the learning rate, from layer to layer; 0: a linear probe")
    flag("--weight_decay", type=float, default=0.05, help="of all but biases, norms, D, positions and CLS")
    flag("--ema_decay", type=float, default=0.99992, help="of the average of the weights; 0: no average")
    flag("--eval_every", type=int, default=1, help="epochs between evaluations")
    flag("--seed", type=int, default=0, help="of all random choices")
    # Regularisation: stochastic depth, and what is for classes alone
    flag("--drop_path", type=float, default=0.1, help="rate that stochastic depth rises to")
    flag("--smoothing", type=float, default=0.1, help="of the labels")
    flag("--mixup", type=float, default=0.8, help="alpha; 0 for none")
    flag("--cutmix", type=float, default=1.0, help="alpha; 0 for none")
    flag("--crop_scale", type=float, default=0.08, help="smallest share of an image that a crop shows")
    flag("--augment", type=float, default=9, help="magnitude of RandAugment; 0 for none")
    flag("--erasing", type=float, default=0.25, help="probability of random erasing")
    flag("--drawings", type=int, default=160, help="images of the demonstration")
    return parse_task_args(parser, evaluated)


def main():
    args = get_args()
    device = start_processes(args)
    if args.eval or args.predict:
        return evaluate_checkpoint(args, device)

    # Data
    train_set, val_set, classes = classified_images(args) if args.task == "classify" else dense_images(args)

    # Model
    torch.manual_seed(args.seed)
    model = make_model(args, len(classes)).to(device)
    run = Run(args, model, train_set.source, device, classes)
    if args.init != "none" and not run.checkpoint:
        from_first_process(lambda: load_weights(model, args.init))  # the others receive them from DDP
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)  # before DDP: those of rate 0 are frozen
    prepare(model, args)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay)) if args.ema_decay else None
    if ema:
        ema.update_parameters(model)  # the first call copies: the average starts from the initial weights
        prepare(ema.module, args)
    if run.checkpoint:
        model.load_state_dict(run.checkpoint["model"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        if ema:
            ema.module.load_state_dict(run.checkpoint["model_ema"])
    best, metric = run.checkpoint.get("best", {}), METRICS[args.task]
    evaluation = evaluation_of(args.task)
    steps, span = args.epochs * run.steps_per_epoch, 1 / max(1 - args.ema_decay, 1e-9)
    note = f"; the average of the weights spans {span:,.0f} steps, more than the run has" if span > steps else ""
    run.start(f"{note}; {len(val_set):,} validation images, {len(classes)} classes")

    # Training
    batches = load(train_set, shuffled(len(train_set), args, run.step), args.workers, device)
    mixes = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]  # (images, labels) -> (images, shares (B, classes))
    mixes = [kind(alpha=alpha, num_classes=len(classes)) for kind, alpha in mixes if alpha]
    mix = v2.RandomChoice(mixes or [v2.Identity()])
    while run.step < steps:
        lr = learning_rate(run.step / run.steps_per_epoch, args, args.min_lr, args.schedule)
        torch.manual_seed(seed_of(args.seed, run.step, process()[0]))  # of mixing, stochastic depth and all in heads
        step_loss = torch.zeros((), device=device)
        for micro_step in range(args.accum_steps):
            images, targets, unreadable = next(batches)
            images, targets = normalize(images, device), to_device(targets, device)
            ddp.require_backward_grad_sync = micro_step == args.accum_steps - 1  # DDP adds gradients up in the last
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                if args.task == "classify":  # its targets are mixed and smoothed: training's choice, not the model's
                    images, targets = mix(images, targets)
                    loss = F.cross_entropy(ddp(images).float(), targets, label_smoothing=args.smoothing)
                else:
                    loss = ddp(images, targets)
            loss = loss / args.accum_steps
            loss.backward()
            step_loss += loss.detach()
            run.unreadable += unreadable[unreadable >= 0].tolist()
        optimizer_step(ddp, optimizer, lr, step_loss)
        if ema:
            ema.update_parameters(model)

        if run.after_step(step_loss, lr):  # every step on CPUs; on GPUs every tenth, and at an epoch's end
            evaluated = run.epoch_ended and (run.epoch % args.eval_every == 0 or run.step == steps)
            if evaluated:
                results, left_out = evaluation(model, val_set, args, device)
                ema_results, _ = evaluation(ema.module, val_set, args, device) if ema else ({}, None)
                run.log_epoch(lr=lr, **results, **{f"ema_{name}": value for name, value in ema_results.items()},
                              unreadable_val=[val_set.source.name(i) for i in left_out])
                for name, found in (("the weights", results), ("their average", ema_results)):
                    if found and not found[metric] <= best.get(metric, -2):  # COCO's none is -1; or it is nan
                        best = {metric: found[metric], "of": name, "epoch": run.epoch}
                if run.first and args.task != "classify":
                    save_pictures(os.path.join(args.out, "predictions.png"), model, val_set, args, device)
            elif run.epoch_ended:
                run.log_epoch(lr=lr)
            if evaluated or run.save_due:
                average = dict(model_ema=ema.module.state_dict()) if ema else {}
                weights = dict(model=model.state_dict(), **average, best=best)
                if evaluated and best["epoch"] == run.epoch:
                    run.save("best.pth", **weights)
                run.save(**weights, optimizer=optimizer.state_dict())
            run.continue_or_stop()
    name, chance = metric, ""
    if args.task == "classify":
        name, chance = "top-1 accuracy", f" (chance: {100 / len(classes):.3g}%)"
    run.end(f"The best {name} was {best[metric]:.2f}%{chance}, of {best['of']} after epoch {best['epoch']}: "
            f"{args.out}/best.pth; every epoch's results in {args.out}/log.jsonl.")


METRICS = dict(classify="top1", detect="box_AP", segment="miou")  # what best.pth is best by, in percent


def to_device(targets, device):
    """A tensor, or a list of dictionaries of tensors."""
    if isinstance(targets, list):
        return [{name: t.to(device, non_blocking=True) for name, t in one.items()} for one in targets]
    return targets.to(device, non_blocking=True)


def make_model(args, num_classes):
    kind = dict(classify=ARMClassifier, detect=ARMDetector, segment=ARMSegmenter)[args.task]
    of_classes = dict(pool=args.pool, directions=args.directions) if args.task == "classify" else {}
    return kind(args.image_size, args.patch_size, **MODELS[args.model], num_classes=num_classes,
                drop_path=args.drop_path, **of_classes)


def evaluation_of(task):
    """(model, dataset, args, device) -> (results, indices of images that cannot be decoded)."""
    return dict(classify=evaluate, detect=evaluate_detector, segment=evaluate_segmenter)[task]


def dense_images(args):
    """The images to train on and those to evaluate on, with objects or labels, as Images; and their classes."""
    train, val = dense_part(args, train=True), dense_part(args, train=False)
    classes = val.source.classes
    check(train.source.classes == classes, f"{args.data} has other classes to train on than to evaluate on")
    return train, val, classes


def dense_part(args, train):
    """Those to train on, or those to evaluate on."""
    if args.task == "detect":
        kind, part = CocoFiles, "train2017" if train else "val2017"
        transform = functools.partial(jitter_objects if train else pad_to_square, args.image_size)
    else:
        kind, part = SceneFiles, "training" if train else "validation"
        transform = segmentation_augment(args.image_size) if train else functools.partial(resize_image, args.image_size)
    return Images(from_first_process(lambda: kind(args.data, part)), transform, args.seed, replace=train)


def check_no_strip(image):
    """image: (3, H, W). Raises BadInput where one side is so short that nothing may be left of it once resized."""
    check(max(image.shape) <= 25 * min(image.shape[1:]), "of so long a strip nothing is left once it is resized")


@torch.no_grad()
def save_pictures(path, model, dataset, args, device):
    """Write a PNG of eight validation images with what the model finds in them."""
    pictures = []
    model.eval()
    for i in range(0, len(dataset), math.ceil(len(dataset) / 8)):
        image, target, unreadable = dataset[0, i]
        if unreadable < 0 and args.task == "detect":
            pictures.append(draw_objects(model, image, dataset.source.classes, device))
        elif unreadable < 0:
            pictures.append(draw_segments(model, image, target, device))
    model.train()
    if pictures:
        with writing(path):
            save_image(pictures, path, nrow=2)


# ----------------------------------------------------------------------------------------------------------------------
# Flags

TASKS = {  # where those of the other tasks differ, of which the paper gives none: this project's choice
    "classify": {},
    # ViTDet's rate for 64 images, in the 36 epochs of Swin Transformer's Mask R-CNN; warm-up: 250 steps of COCO
    "detect": dict(image_size=1024, epochs=36, warmup_epochs=0.14, batch_size=64, blr=4e-4, schedule="steps",
                   layer_decay=0.7, weight_decay=0.1, ema_decay=0.0, eval_every=4, out="runs/detect"),
    # BEiT's and Swin Transformer's UPerNet: 160,000 steps of 16 images of ADE20K, 1,500 of them warm-up
    "segment": dict(image_size=512, epochs=127, warmup_epochs=1.2, batch_size=16, blr=9.6e-4, schedule="line",
                    min_lr=0.0, layer_decay=0.9, ema_decay=0.0, eval_every=10, out="runs/segment"),
}
DETECTION = {"arm_large": dict(layer_decay=0.8, drop_path=0.4), "arm_huge": dict(layer_decay=0.9, drop_path=0.5)}


def parse_task_args(parser, evaluated):
    """The arguments, by the recipe of the task and the model; those of a checkpoint to evaluate are defaults."""
    parser.set_defaults(**evaluated)
    given, _ = parser.parse_known_args()
    if given.task != "classify":
        check(given.data, f"--task {given.task} needs --data: the demonstration is of classes")
        of_classes = given.predict, given.classes, given.real_labels, given.directions != 4, given.pool != "mean"
        check(not any(of_classes),
              "--predict, --classes, --real_labels, --directions and --pool are for --task classify")
        check(given.task == "segment" or COCO, "--task detect needs pycocotools: pip install pycocotools")
    parser.set_defaults(**TASKS[given.task])
    args = parse_args(parser, dict(classify=RECIPES, detect=DETECTION, segment={})[given.task], **evaluated)
    together = args.batch_size // args.accum_steps // (1 if args.device == "cuda" else process()[1])
    check(args.task != "segment" or args.eval or together > 1, "--task segment has batch norm, which needs two images "
          "or more at a time: choose a larger --batch_size or a smaller --accum_steps")
    check(not args.predict or args.data and os.path.exists(args.data), "--predict needs --data, an image or a folder "
          f"of images, and there is no {args.data or 'such flag'}")
    check(not (args.eval and args.predict), "--eval and --predict are two things: give one")
    for name in ("layer_decay", "ema_decay", "smoothing", "crop_scale", "erasing"):
        check(getattr(args, name) <= 1, f"--{name} is from 0 to 1, not {getattr(args, name)}")
    peak = args.blr * args.batch_size / 256
    check(args.eval or args.min_lr <= peak, f"--min_lr {args.min_lr:g} is above the peak learning rate, --blr x "
                                            f"--batch_size / 256 = {peak:g}")
    demonstration = "runs/demo_pretrain/last.pth"
    args.init = args.init or (demonstration if not args.data and os.path.exists(demonstration) else "none")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def predictions(model, dataset, left_out, args, device, size=None, forward=None):
    """This process's share of a data set, `size` images at a time: their indices, what the model (or forward(images))
    gives, and their targets. Indices of images that cannot be decoded are appended to left_out.
    """
    rank, processes = process()
    mine = [(0, i) for i in range(rank, len(dataset), processes)]
    # Without gradients 64 images of one object fit, and fewer at a time are slow.
    size = size or max(64, args.batch_size // (processes * args.accum_steps))
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    loaded = tqdm(load(dataset, batches, args.workers, device), "evaluating", len(batches), leave=False,
                  disable=True if rank else None)  # None: where there is no terminal
    model.eval()
    for keys, (images, targets, unreadable) in zip(batches, loaded):
        left_out += unreadable[unreadable >= 0].tolist()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = (forward or model)(normalize(images, device))
        yield [i for _, i in keys], outputs, targets
    model.train()


def evaluate_checkpoint(args, device):
    """Print the results of a checkpoint's weights and, where it has one, of their average; or, to --predict, what
    classes the better of them see in images without labels.
    """
    path = args.eval or args.predict
    made = from_first_process(lambda: describe(path))
    args, num_classes = get_args(**made["sizes"]), made["num_classes"]  # again: its sizes are the defaults now
    its_task = made["sizes"].get("task", "classify")
    check(args.task == its_task, f"{path} was finetuned to {its_task}, not to {args.task}: give --task {its_task}")
    model = make_model(args, num_classes).to(device)
    prepare(model, args)
    classes = from_first_process(lambda: read_classes(args.classes)) if args.classes else made["classes"]
    check(classes is None or len(classes) == num_classes, f"{args.classes} names {len(classes or [])} classes, and "
                                                          f"{path} has {num_classes}")
    if args.predict:
        load_everywhere(model, path, made["best_is_ema"])
        return predict(model, classes or range(num_classes), args, device)
    evaluation = evaluation_of(args.task)
    if args.task == "classify":
        source, right, protocol = validation_images(args, classes, num_classes)
        dataset = Images(source, eval_transform(args.image_size), replace=False)
        evaluation = functools.partial(evaluation, right=right)
    else:
        dataset, protocol = dense_part(args, train=False), f"{num_classes} classes"
        check(dataset.source.classes == classes, f"{path} was finetuned on other classes than those of {args.data}")
    for ema in (False, True) if made["has_ema"] else (False,):
        load_everywhere(model, path, ema)
        started = time.monotonic()
        results, left_out = evaluation(model, dataset, args, device)
        speed = len(dataset) / (time.monotonic() - started)
        if args.task == "classify":
            top5 = f"top-5 {results['top5']:.2f}%, " if "top5" in results else ""
            told = f"top-1 {results['top1']:.2f}%, {top5}loss {results['val_loss']:.4f}"
        else:
            told = json.dumps(results)
        if process()[0] == 0:
            print(f"Evaluated at {speed:,.0f} images/s.")
            print(f"{'EMA' if ema else 'Model'}: {told} over {len(dataset) - len(left_out):,} images, {protocol}")
    if process()[0] == 0:
        for i in left_out:
            print(f"Cannot decode {dataset.source.name(i)}: it is left out.")


def load_everywhere(model, path, ema):
    """load_weights on the first process, from which the others receive them."""
    fresh = from_first_process(lambda: load_weights(model, path, ema))
    check(not fresh & {"head", "roi_heads"}, f"{path} has no classifier")
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)


def describe(path):
    """What a checkpoint tells of itself: the arguments of ours that size its model, its classes (None if it names none)
    and their number, and whether it holds an average of the weights and did best by it.
    """
    found = read_checkpoint(path)
    made = found.get("args")
    weights = next((w for w in (found.get("model"), found.get("state_dict")) if isinstance(w, dict)), found)
    known = isinstance(made, dict) and made.get("model") in MODELS
    names = ("task", "model", "image_size", "patch_size", "pool", "directions")
    sizes = {name: made[name] for name in names if known and name in made}
    head = next((v for k, v in weights.items() if str(k).endswith("head.weight")), None)
    if sizes.get("task", "classify") != "classify":
        head = found["classes"]  # the heads of the other tasks are of the classes that ours name
    check(head is not None, f"{path} has no classifier: --eval and --predict take what finetuning has made")
    return dict(sizes=sizes, classes=found.get("classes"), num_classes=len(head), has_ema="model_ema" in found,
                best_is_ema="model_ema" in found and found.get("best", {}).get("of") == "their average")


# ----------------------------------------------------------------------------------------------------------------------
# Classes: images, how they are counted, and augmentation


def classified_images(args):
    """The images to train on, those to evaluate on, as Images, and the names of the classes; or the demonstration's."""
    if args.data:
        classes, *names = from_first_process(lambda: find_images(args.data))
        check(len(classes) > 1, f"{args.data}/train has one class alone, {classes[0]}: there is nothing to tell apart")
        train, val = (ImageFiles(os.path.join(args.data, part), its_names, labels_of(its_names, classes))
                      for part, its_names in zip(("train", "val"), names))
    else:
        train, val = Drawings(args.drawings, args.image_size, seed=1), Drawings(500, args.image_size, seed=2)
        classes = train.classes
    return (Images(train, train_transform(args), args.seed),
            Images(val, eval_transform(args.image_size), replace=False), classes)


def find_images(folder):
    """The classes and the image names of train/ and val/ below a folder: (classes, train names, val names). Classes are
    the folders of train/. Raises BadInput where a folder is missing or empty, or val/ has a class that train/ has not.
    """
    train, val = (list_images(os.path.join(folder, part)) for part in ("train", "val"))
    classes = classes_of(train, os.path.join(folder, "train"))
    unknown = sorted({*classes_of(val, os.path.join(folder, "val"))} - {*classes})
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


def labels_of(names, classes):
    """The label of each image: the place among the classes of the folder that it stands in."""
    label = {name: i for i, name in enumerate(classes)}
    return [label[name.split(os.sep)[0]] for name in names]


def evaluate(model, dataset, args, device, right=None):
    """Top-1 and, of more than five classes, top-5 accuracy in percent and the mean cross-entropy, over every image once
    on any number of processes. Images that cannot be decoded are left out. Returns (results, indices left out).

    right: (labels, classes), true where a class of the model's is right for a label of the data's; without it, each
    label is of its class. Predictions are taken from the classes that are right for any label.
    """
    right, left_out = torch.eye(model.head.out_features).bool() if right is None else right, []
    right = right.to(device)
    among, totals = right.any(dim=0), torch.zeros(4, dtype=torch.float64, device=device)
    for _, logits, labels in predictions(model, dataset, left_out, args, device):
        labels = labels.to(device)
        readable = labels >= 0
        logits = logits[readable].float().masked_fill(~among, -math.inf)  # (B, classes)
        its_right = right[labels[readable]]  # (B, classes)
        hit = its_right.gather(1, logits.topk(min(5, logits.shape[1])).indices)  # (B, 5)
        loss = -logits.log_softmax(dim=1).masked_fill(~its_right, -math.inf).logsumexp(dim=1)
        totals += torch.stack([hit[:, 0].sum(), hit.any(dim=1).sum(), loss.sum(), readable.sum()])
    dist.all_reduce(totals)
    top1, top5, loss = (totals[:3] / totals[3].clamp(min=1)).tolist()
    top5 = dict(top5=100 * top5) if among.sum() > 5 else {}
    return dict(top1=100 * top1, **top5, val_loss=loss), sorted(union(left_out))


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
    """The images of --data, in class folders that stand in val/ or in the folder itself; what is right for them, as
    evaluate takes it; and this protocol in words.
    """
    everything = torch.eye(num_classes, dtype=torch.bool)
    if not args.data:
        source = Drawings(500, args.image_size, seed=2)
        check(num_classes == 10 and (not classes or classes == source.classes), "without --data there is the "
              "demonstration alone, which has other classes than the checkpoint: give --data")
        return source, everything, f"{num_classes} classes of drawings"
    folder = os.path.join(args.data, "val")
    folder = folder if os.path.isdir(folder) else args.data
    names = from_first_process(lambda: list_images(folder))
    if args.real_labels:
        names, right = from_first_process(lambda: read_real_labels(args.real_labels, names, num_classes))
        right = torch.cat([right, right.new_ones(1, num_classes)])  # no image's: predictions are from all classes
        return ImageFiles(folder, names, range(len(names))), right, "by their ReaL labels"
    its_own = classes_of(names, folder)
    train = os.path.join(args.data, "train")  # of whose classes val/ may have a part
    beside = read_classes(train) if os.path.isdir(train) else []
    choice = in_order({*its_own, *(name for name in beside if not classes or name in classes)})
    right = everything[[*class_indices(choice, classes, num_classes)]]
    protocol = f"{num_classes:,} classes"
    if len(choice) < num_classes:
        protocol = f"of {len(choice):,} of {protocol}, from which predictions are taken"
    return ImageFiles(folder, names, labels_of(names, choice)), right, protocol


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


def predict(model, classes, args, device):
    """The five classes that an image most likely is of, with their probabilities: of one image on the screen, of the
    images in a folder as --out/predictions.csv.
    """
    one = os.path.isfile(args.data)
    folder, name = os.path.split(args.data) if one else (args.data, "")
    names = [name] if one else from_first_process(lambda: list_images(folder))
    dataset = Images(ImageFiles(folder, names), eval_transform(args.image_size), replace=False)
    most, rows, unreadable = min(5, len(classes)), [], []
    if not one:
        from_first_process(lambda: open_in(args.out, "predictions.csv").close())  # that it can be, before the work
    for indices, logits, _ in predictions(model, dataset, unreadable, args, device):
        found = logits.float().softmax(dim=1).topk(most)
        for i, best, shares in zip(indices, found.indices.tolist(), found.values.tolist()):
            row = [f"{value}" for k, share in zip(best, shares) for value in (classes[k], f"{share:.4f}")]
            rows.append((i, *(["cannot be decoded"] if i in unreadable else row)))
    check(not one or not union(unreadable), f"{args.data} cannot be decoded")
    rows = [[dataset.source.name(i), *row] for i, *row in sorted(union(rows))]
    if process()[0] > 0:
        return
    if one:
        _, *row = rows[0]
        print(", ".join(f"{name} {float(share):.1%}" for name, share in zip(row[::2], row[1::2])))
        return
    path = os.path.join(args.out, "predictions.csv")
    header = [f"{what}_{k}" for k in range(1, 1 + most) for what in ("class", "probability")]
    with writing(path), open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([["image", *header], *rows])
    print(f"{len(rows):,} images: {path}")


def train_transform(args):
    """The recipe's augmentation of one image, uint8 to uint8; Mixup and CutMix follow on the batch."""
    crop = v2.RandomResizedCrop(args.image_size, scale=(args.crop_scale, 1), interpolation=InterpolationMode.BICUBIC)
    augment = RandAugment(args.augment) if args.augment else v2.Identity()
    return v2.Compose([crop, v2.RandomHorizontalFlip(), augment, RandomErasing(args.erasing)])


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

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        if params["v"] is not None:  # None: nothing is erased
            mean, std = mean_and_std(torch.device("cpu"))
            noise = torch.randn(3, params["h"], params["w"]) * std + mean
            params["v"] = (noise * 255).round().clamp(0, 255).byte()
        return params


# ----------------------------------------------------------------------------------------------------------------------
# Detection: Mask R-CNN on COCO

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:  # --task detect alone needs it
    COCO = None


class CocoFiles(ImageFiles):
    """COCO's images as (uint8 image, target), target["labels"]: n numbers, k for classes[k - 1]; target["masks"]:
    (n, H, W). train2017: no crowds, and no images without other objects; val2017: all images, without targets, which
    pycocotools reads. Objects are held as JSON in one array of bytes, for the reason that names are. Raises BadInput
    where annotations cannot be read, or an image is missing.
    """

    blank = dict(labels=[], masks=tv_tensors.Mask(torch.zeros(0, 1, 1, dtype=torch.uint8)))

    def __init__(self, folder, part):
        self.annotations, folder = f"{folder}/annotations/instances_{part}.json", os.path.join(folder, part)
        try:
            present = set(os.listdir(folder))
            with open(self.annotations) as file:
                found = json.load(file)
            categories = dict(sorted((one["id"], one["name"]) for one in found["categories"]))
            self.categories, self.classes = [*categories], [*categories.values()]  # the ids have gaps
            objects = {image["id"]: [] for image in found["images"]}
            for one in found["annotations"]:
                if not {"id", "area"} <= one.keys():  # which the evaluation reads
                    raise KeyError("id or area")
                if not one["iscrowd"]:
                    label = self.categories.index(one["category_id"]) + 1
                    objects[one["image_id"]].append((label, one["segmentation"]))
            self.train = part == "train2017"
            images = [image for image in found["images"] if objects[image["id"]] or not self.train]
            names, self.ids = [image["file_name"] for image in images], [image["id"] for image in images]
            texts = [json.dumps(objects[image["id"]]).encode() for image in images]
        except OSError as error:
            raise BadInput(f"cannot read {error.filename}, {error.strerror}: --task detect takes COCO's folder of "
                           f"train2017/, val2017/ and annotations/") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{self.annotations} is not COCO's JSON of instances: {error!r}") from None
        missing = min({*names} - present, default=None)
        check(not missing, f"{folder} has no {missing}, which {self.annotations} names")
        check(any(objects.values()), f"{self.annotations} names no objects")
        super().__init__(folder, names)
        self.objects, self.ends = np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])

    def __getitem__(self, i):
        image, _ = super().__getitem__(i)
        check_no_strip(image)
        if not self.train:
            return image, {}
        labels, shapes = zip(*json.loads(self.objects[self.ends[i] : self.ends[i + 1]].tobytes()))
        masks = torch.stack([decode_mask(shape, *image.shape[1:]) for shape in shapes])
        return image, dict(labels=[*labels], masks=tv_tensors.Mask(masks))


def decode_mask(shape, height, width):
    """COCO's polygons or run lengths -> the mask (H, W), uint8."""
    if isinstance(shape, list):
        shape = rle.merge(rle.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        shape = rle.frPyObjects(shape, height, width)
    check(tuple(shape["size"]) == (height, width), "the mask has another size than the image")
    return torch.from_numpy(rle.decode(shape))


def jitter_objects(size, image, target):
    """Large-scale jitter (Ghiasi et al., 2021): resize by 0.1 to 2, crop or pad to a square of `size`, flip. Boxes are
    those of the masks; objects of which nothing is left are dropped. Returns what ARMDetector takes.
    """
    crop = v2.RandomCrop(size, pad_if_needed=True, fill={torch.Tensor: GREY, tv_tensors.Mask: 0})
    jitter = v2.Compose([v2.ScaleJitter((size, size), (0.1, 2.0)), crop, v2.RandomHorizontalFlip(), v2.ToPureTensor()])
    image, target = jitter(image, target)
    seen = target["masks"].flatten(1).bool().any(dim=1)
    masks, labels = target["masks"][seen], torch.tensor(target["labels"], dtype=torch.int64)[seen]
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # to the far side of the last pixel
    return image, dict(boxes=boxes, labels=labels, masks=masks)


def pad_to_square(size, image, _):
    """An image whose longer side becomes `size`, padded below and on the right; and its own size, and what boxes are to
    be multiplied by for it.
    """
    resized = v2.functional.resize(image, None, max_size=size)
    (height, width), own = resized.shape[1:], image.shape[1:]
    square = v2.functional.pad(resized, [0, 0, size - width, size - height], fill=GREY)
    return square, dict(size=own, scale=[own[1] / width, own[0] / height] * 2)


def evaluate_detector(model, dataset, args, device):
    """COCO's numbers (average_precision) over all images on any number of processes. Those that cannot be decoded are
    left out. Returns (results, indices left out).
    """
    found, left_out, source = [], [], dataset.source
    size = min(8, args.batch_size // (process()[1] * args.accum_steps)) or 1
    for indices, detections, targets in predictions(model, dataset, left_out, args, device, size):
        for i, one, target in zip(indices, detections, targets):
            if i in left_out:
                continue
            boxes = one["boxes"] * one["boxes"].new_tensor(target["scale"])
            boxes = clip_boxes_to_image(boxes, target["size"])
            masks = paste_masks_in_image(one["masks"], boxes, target["size"])[:, 0] > 0.5  # (n, H, W)
            masks = rle.encode(np.asfortranarray(masks.byte().permute(1, 2, 0).cpu().numpy()))
            boxes[:, 2:] -= boxes[:, :2]  # to left, top, width, height
            for label, score, box, mask in zip(one["labels"].tolist(), one["scores"].tolist(), boxes.tolist(), masks):
                found.append(json.dumps(dict(
                    image_id=source.ids[i], category_id=source.categories[label - 1], score=score, bbox=box,
                    segmentation=dict(mask, counts=mask["counts"].decode()))))
    found, left_out = sorted(union(found)), sorted(union(left_out))  # in one order, whichever process found them
    return from_first_process(lambda: average_precision(source, found, left_out)), left_out


def average_precision(source, found, left_out):
    """COCO's AP of boxes and masks and, under "box" and "mask", its twelve numbers, in percent; -1: there are no such
    objects. found: detections in COCO's format, as JSON; left_out: indices of images.
    """
    results = {}
    names = "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        truth = COCO(source.annotations)
        for name, kind, other in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
            rows = [json.loads(one) for one in found]
            for row in rows:
                del row[other]  # small and large are then by the area of this shape
            scores = COCOeval(truth, truth.loadRes(rows) if rows else COCO(), kind)
            scores.params.imgIds = [image for i, image in enumerate(source.ids) if i not in left_out]
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
            results[name] = {n: round(100 * v, 3) if v >= 0 else -1.0 for n, v in zip(names, scores.stats.tolist())}
    return dict(box_AP=results["box"]["AP"], mask_AP=results["mask"]["AP"], **results)


def draw_objects(model, image, classes, device):
    """image: (3, S, S), with the objects found in it, those with a score of at least 0.5."""
    found = model(normalize(image[None], device))[0]
    found = {name: values[found["scores"] >= 0.5].cpu() for name, values in found.items()}
    boxes, labels, scores = found["boxes"], found["labels"].tolist(), found["scores"].tolist()
    if labels:
        masks = paste_masks_in_image(found["masks"], boxes, image.shape[1:])[:, 0] > 0.5  # (n, S, S)
        names = [f"{classes[k - 1]} {score:.0%}" for k, score in zip(labels, scores)]
        colors = [f"hsl({137 * k % 360}, 100%, 60%)" for k in range(len(names))]
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colors)
        image = draw_bounding_boxes(image, boxes, names, colors)
    return image / 255


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation: UPerNet on ADE20K


class SceneFiles(ImageFiles):
    """ADE20K's images of a part, training or validation, as (uint8 image, labels (H, W), uint8). In its files 0 is no
    class and 1 to 150 are classes; here 255 is none and classes are 0 to 149. Raises BadInput where files are missing.
    """

    blank = tv_tensors.Mask(torch.full((1, 1), 255, dtype=torch.uint8))
    classes = [str(k) for k in range(1, 151)]

    def __init__(self, folder, part):
        images, self.annotations = (os.path.join(folder, kind, part) for kind in ("images", "annotations"))
        super().__init__(images, list_images(images))
        missing = next((path for path in map(self.label_path, range(len(self))) if not os.path.exists(path)), None)
        check(not missing, f"there is no {missing}: --task segment takes a folder with ADE20K's images/ and "
                           f"annotations/, a PNG of labels for each image")

    def label_path(self, i):
        return os.path.join(self.annotations, os.path.splitext(self.name(i))[0] + ".png")

    def __getitem__(self, i):
        image, _ = super().__getitem__(i)
        check_no_strip(image)
        with Image.open(self.label_path(i)) as file:
            check(file.mode in ("L", "P"), f"the labels are no bytes, one for each pixel, but of mode {file.mode}")
            labels = v2.functional.pil_to_tensor(file)[0] - 1  # (H, W), of bytes: 0 becomes 255
        check(labels.shape == image.shape[1:], "the labels have another size than the image")
        check(((labels < 150) | (labels == 255)).all(), "there are labels above 150")
        return image, tv_tensors.Mask(labels)


def segmentation_augment(size):
    """The shorter side resized to 0.5 to 2 times `size`, a crop, padded where it is smaller, flip, and colours changed:
    first here, before there is padding; contrast comes last or second. As mmsegmentation, but brightness multiplied.
    """
    colors = [v2.RandomApply([v2.ColorJitter(**{name: most})], p=0.5)
              for name, most in dict(brightness=0.25, saturation=0.5, hue=0.1, contrast=0.5).items()]
    colors = v2.RandomChoice([v2.Compose(colors), v2.Compose([colors[k] for k in (0, 3, 1, 2)])])
    resize = v2.RandomChoice([v2.Resize(side, max_size=4 * side) for side in range(size // 2, 2 * size + 1)])
    crop = RandomLabelCrop(size, pad_if_needed=True, fill={torch.Tensor: GREY, tv_tensors.Mask: 255})
    return v2.Compose([colors, resize, crop, v2.RandomHorizontalFlip(), v2.ToPureTensor()])


class RandomLabelCrop(v2.RandomCrop):
    """A crop that is drawn again, up to ten times, where one class has over 75% of its labelled pixels."""

    def make_params(self, flat_inputs):
        for _ in range(10):
            params = super().make_params(flat_inputs)
            counts = self.transform(flat_inputs[1], params).flatten().bincount(minlength=256)[:255]
            if counts.max() <= 0.75 * counts.sum():
                break
        return params


def resize_image(size, image, labels):
    """An image whose shorter side becomes `size`, or its longer side four times that; the labels as they are."""
    return v2.functional.resize(image, size, max_size=4 * size), labels


def evaluate_segmenter(model, dataset, args, device):
    """Mean intersection over union and the share of labelled pixels that are right, in percent, from all images
    together on any number of processes; classes that occur in neither labels nor predictions do not count. Images that
    cannot be decoded are left out. Returns (results, indices left out).
    """
    n, left_out = len(dataset.source.classes), []
    confusion = torch.zeros(n * n, dtype=torch.int64, device=device)  # (labels, predictions)
    for buffer in model.buffers():  # on CPUs, each process's batch norm has statistics of its own
        dist.broadcast(buffer, src=0)
    in_windows = functools.partial(slide, model, size=args.image_size)
    for indices, logits, labels in predictions(model, dataset, left_out, args, device, 1, in_windows):
        if indices[0] in left_out:
            continue
        labels = labels.to(device)  # (1, H, W)
        predicted = F.interpolate(logits, size=labels.shape[1:], mode="bilinear").argmax(dim=1)
        known = labels < n
        confusion += torch.bincount(labels[known].long() * n + predicted[known], minlength=n * n)
    dist.all_reduce(confusion)
    confusion = confusion.view(n, n).double()
    both, labelled = confusion.diag(), confusion.sum(dim=1)
    iou = both / (labelled + confusion.sum(dim=0) - both)
    miou, accuracy = iou.nanmean().item(), (both.sum() / labelled.sum()).item()
    return dict(miou=100 * miou, pixel_accuracy=100 * accuracy), sorted(union(left_out))


def slide(model, images, size):
    """Logits of images (1, 3, H, W) of any size: means of those of windows of `size`, which overlap by a third."""
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(size - width, 0), 0, max(size - height, 0)))
    tops, lefts = ([*range(0, side - size, size * 2 // 3), side - size] for side in images.shape[2:])
    places = [(..., slice(top, top + size), slice(left, left + size)) for top in tops for left in lefts]
    windows = model(torch.cat([images[place] for place in places]))  # (windows, classes, size, size)
    logits, count = images.new_zeros(1, windows.shape[1], *images.shape[2:]), torch.zeros_like(images[:, :1])
    for place, window in zip(places, windows):
        logits[place] += window
        count[place] += 1
    return (logits / count)[..., :height, :width]


PALETTE = torch.rand(256, 3, generator=torch.Generator().manual_seed(0))  # of the classes
PALETTE[255] = 0  # no class


def draw_segments(model, image, labels, device):
    """The middle of an image, the classes found there and its labels, side by side: (3, S, 3 S)."""
    size = model.patch_embed.image_size
    labels = v2.functional.resize(tv_tensors.Mask(labels[None]), image.shape[1:])
    image, labels = (v2.functional.center_crop(t, size) for t in (image, labels))
    predicted = model(normalize(image[None], device)).argmax(dim=1).cpu()  # (1, S, S)
    return torch.cat([image / 255, *(PALETTE[t[0].long()].movedim(2, 0) for t in (predicted, labels))], dim=2)


if __name__ == "__main__":
    end_with_a_sentence(main)
