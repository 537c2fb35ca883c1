"""Finetune a pretrained ARM for recognition, in four scan directions; or train the same model from scratch; or evaluate
it (section 3.3; recipe: appendix of the ARM paper).

    torchrun --standalone --nproc_per_node 1 finetune.py                                             # demonstration
    torchrun --nproc_per_node 8 finetune.py --data /data/imagenet --init runs/pretrain/last.pth      # the paper's ARM-B
    torchrun --nproc_per_node 8 finetune.py --data /data/imagenet --eval runs/finetune/best.pth

--data holds train/CLASS/* and val/CLASS/*. The defaults are the paper's recipe. A run goes to --out (last.pth,
best.pth, log.jsonl); the same command continues it. Model and weight average (EMA) are evaluated after each epoch.
"""

import contextlib
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from arm import MODELS, ARMClassifier, load_weights, read_checkpoint
from pretrain import (MEAN, Batches, Drawings, ImageFiles, Images, Parser, Progress, add_common_arguments, bad_input,
                      check_run, from_first_process, gather, learning_rate, list_images, make_loader, mean_and_std,
                      move, normalize, optimizer_step, parse_args, prepare, process, resume_checkpoint, run,
                      save_checkpoint, seed_of, start_processes)

RECIPES = {  # where the paper's recipe differs between models; it gives none for arm_huge, which takes arm_large's
    "arm_large": dict(layer_decay=0.75, drop_path=0.3),
    "arm_huge": dict(layer_decay=0.75, drop_path=0.3),
}
DEMONSTRATION = dict(model="arm_tiny", image_size=48, patch_size=8, epochs=24, warmup_epochs=1, batch_size=16,
                     blr=1.6e-2, layer_decay=0.85, drop_path=0.0, ema_decay=0.95, mixup=0.0, cutmix=0.0, erasing=0.0,
                     augment=0, crop_scale=0.6, workers=0, compile=0, drawings=160, out="runs/demo_finetune")


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


class RandAugment(v2.RandAugment):
    """RandAugment as MAE finetunes (timm's rand-m9-mstd0.5-inc1), in torchvision's frame.

    It differs from torchvision's own: each of the two operations is applied with probability 0.5, at a magnitude drawn
    from a normal distribution; severities increase with it throughout; Invert and SolarizeAdd join, Identity leaves.
    """

    _AUGMENTATION_SPACE = {  # operation: (its magnitude at strength m from 0 to 1 for an image side, either sign?)
        "AutoContrast": (lambda m, side: 0.0, False),
        "Equalize": (lambda m, side: 0.0, False),
        "Invert": (lambda m, side: 0.0, False),
        "Rotate": (lambda m, side: 30 * m, True),  # degrees
        "Posterize": (lambda m, side: 4 - int(4 * m), False),  # bits kept
        "Solarize": (lambda m, side: (256 - int(256 * m)) / 255, False),  # threshold, a share of white
        "SolarizeAdd": (lambda m, side: int(110 * m), False),
        "Color": (lambda m, side: 0.9 * m, True),
        "Contrast": (lambda m, side: 0.9 * m, True),
        "Brightness": (lambda m, side: 0.9 * m, True),
        "Sharpness": (lambda m, side: 0.9 * m, True),
        "ShearX": (lambda m, side: 0.3 * m, True),
        "ShearY": (lambda m, side: 0.3 * m, True),
        "TranslateX": (lambda m, side: 0.45 * m * side, True),  # pixels
        "TranslateY": (lambda m, side: 0.45 * m * side, True),
    }

    def __init__(self, magnitude):
        super().__init__(num_ops=2, magnitude=magnitude, interpolation=InterpolationMode.BICUBIC,
                         fill=[round(255 * mean) for mean in MEAN])

    def forward(self, image):
        """image: uint8 (3, H, W) -> the same. Inside it is a PIL image: torchvision warps no tensor bicubically."""
        pil = v2.functional.to_pil_image(image)
        for _ in range(self.num_ops):
            if torch.rand(()) < 0.5:
                name, (magnitude_at, signed) = self._get_random_item(self._AUGMENTATION_SPACE)
                strength = (self.magnitude + 0.5 * torch.randn(()).item()) / 10
                magnitude = magnitude_at(min(max(strength, 0.0), 1.0), pil.width if name[-1] == "X" else pil.height)
                if signed and torch.rand(()) < 0.5:
                    magnitude = -magnitude
                pil = self.apply(pil, name, magnitude)
        return v2.functional.pil_to_tensor(pil)

    def apply(self, pil, name, magnitude):
        """One operation on a PIL image, by its name in the table."""
        if name == "SolarizeAdd":
            return pil.point([min(255, i + magnitude) if i < 128 else i for i in range(256)] * 3)
        if name == "Posterize":  # down to 0 bits, which is black and which PIL's own refuses from Pillow 13 on
            return pil.point([i & ~(255 >> magnitude) for i in range(256)] * 3)
        return self._apply_image_or_video_transform(pil, name, magnitude, self.interpolation, self._fill)


class RandomErasing(v2.RandomErasing):
    """torchvision's random erasing with pixel noise, on uint8 images: the noise is normal once they are normalised,
    and clipped to the range of a pixel.
    """

    def __init__(self, p):
        super().__init__(p=p, value="random")

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            h, w = params["h"], params["w"]
            mean, std = mean_and_std(torch.device("cpu"))
            params["v"] = ((torch.randn(3, h, w) * std + mean) * 255).round().clamp(0, 255).byte()
        return params


def train_transform(args):
    """The recipe's augmentation of one image, uint8 to uint8; Mixup and CutMix follow on the batch."""
    return v2.Compose([
        v2.RandomResizedCrop(args.image_size, scale=(args.crop_scale, 1), interpolation=InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        *([RandAugment(args.augment)] if args.augment else []),
        *([RandomErasing(args.erasing)] if args.erasing else []),
    ])


def eval_transform(image_size):
    """Resize the shorter side and crop the centre: 256 and 224, in this ratio up to 384; from there, no margin."""
    shorter_side = image_size * 256 // 224 if image_size < 384 else image_size
    return v2.Compose([v2.Resize(shorter_side, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(image_size)])


def draw_mixing(pairs, image_size, mixup, cutmix, seed):
    """What Mixup or CutMix (each with probability 0.5, where both are on) does to each pair: (pairs, 5), the share that
    an image keeps outside a box, and the box's top, bottom, left and right, inside which it keeps nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)

        def beta(alpha):
            return torch.distributions.Beta(alpha, alpha).sample((pairs,)) if alpha else torch.ones(pairs)
        share, area = beta(mixup), 1 - beta(cutmix)
        center = torch.rand(2, pairs) * image_size
        use_cutmix = torch.rand(pairs) < (0.5 if mixup and cutmix else float(cutmix > 0))
    half = (area * use_cutmix).sqrt() * image_size / 2
    (top, left), (bottom, right) = (c.round().clamp(0, image_size) for c in (center - half, center + half))
    return torch.stack([torch.where(use_cutmix, 1.0, share), top, bottom, left, right], dim=1)


def mix(images, targets, mixing):
    """Mix each pair of neighbours, images 2 i and 2 i + 1, one with the other, and their targets by the same share.

    images: (B, 3, H, W); targets: (B, classes); mixing: (B / 2, 5) of draw_mixing, on the same device. Neighbours,
    since a pair is then on one process, however many there are; torchvision's Mixup and CutMix roll the whole batch.
    """
    share, top, bottom, left, right = mixing[:, :, None, None, None].unbind(1)  # (B / 2, 1, 1, 1) each
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (B / 2, 1, H, W)
    share = (share * ~inside).repeat_interleave(2, dim=0)  # (B, 1, H, W)
    target_share = share.mean(dim=(2, 3))  # (B, 1)

    def partner(t):
        return t.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    return (share * images + (1 - share) * partner(images),
            target_share * targets + (1 - target_share) * partner(targets))


# ----------------------------------------------------------------------------------------------------------------------
# Optimisation and evaluation


def parameter_groups(model, weight_decay, layer_decay):
    """The optimiser's groups: layer-wise learning rates, and weight decay for matrices alone.

    With n = depth + 1, a parameter of layer g has its rate multiplied by layer_decay ** (n - g): the embeddings are
    layer 0, block i is i + 1, the final norm and the head are n. Groups have "names", "lr_scale" and "weight_decay".
    """
    n = len(model.layers) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        layer = int(rest[0]) + 1 if part == "layers" else n if part in ("norm", "head") else 0
        decay = 0.0 if parameter.ndim == 1 or part in ("pos_embed", "cls_token") else weight_decay
        group = groups.setdefault((layer, decay), dict(params=[], names=[], lr_scale=layer_decay ** (n - layer),
                                                       weight_decay=decay))
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


@torch.no_grad()
def evaluate(model, dataset, args, device):
    """Top-1 and top-5 accuracy in percent and the mean cross-entropy, over every image once on any number of processes.

    Images that cannot be decoded are left out. Returns (top1, top5, loss, indices of the images left out).
    """
    rank, processes = process()
    mine = [(0, i) for i in range(rank, len(dataset), processes)]
    size = max(64, args.batch_size // (processes * args.accum_steps))  # without gradients these fit, and fewer are slow
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    totals, left_out = torch.zeros(4, dtype=torch.float64, device=device), set()
    model.eval()
    for images, labels, unreadable in make_loader(dataset, batches, args, device):
        left_out.update(unreadable[unreadable >= 0].tolist())
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(normalize(images, device)).float()  # (B, classes)
        readable = labels >= 0
        logits, labels = logits[readable], labels[readable]
        hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([hit[:, 0].sum(), hit.sum(), loss, readable.sum()])
    model.train()
    dist.all_reduce(totals)
    top1, top5, loss, count = totals.tolist()
    return 100 * top1 / max(count, 1), 100 * top5 / max(count, 1), loss / max(count, 1), sorted(gather(left_out))


def find_images(folder, evaluate_only):
    """The classes and the image names of train/ and val/ below a folder: (classes, train names, val names).

    Classes are the folders of train/, sorted; evaluating alone needs no train/ and then takes those of val/. Raises
    ValueError where a folder is missing or empty, or val/ has a class that train/ has not.
    """
    def classes_of(part, names):
        loose = [name for name in names if os.sep not in name]
        if loose:
            raise ValueError(f"{os.path.join(folder, part, loose[0])} is in no class: images belong in "
                             f"{os.path.join(folder, part)}/CLASS/.")
        return sorted({name.split(os.sep)[0] for name in names})

    val = list_images(os.path.join(folder, "val"))
    classes = classes_of("val", val)
    train = []
    if not evaluate_only or os.path.isdir(os.path.join(folder, "train")):
        train = list_images(os.path.join(folder, "train"))
        classes, val_classes = classes_of("train", train), classes
        unknown = [name for name in val_classes if name not in set(classes)]
        if unknown:
            raise ValueError(f"{folder}/val has {len(unknown)} classes that {folder}/train has not, such as "
                             f"{unknown[0]}: a class needs training images.")
    return classes, train, val


def check_classes(path, its_own, classes):
    """Raises ValueError where a checkpoint's classes, None if it names none, are others than the images'."""
    only_in_one = set(its_own or classes) ^ set(classes)
    if only_in_one:
        raise ValueError(f"{path} was finetuned on {len(its_own)} classes, the images are of {len(classes)}, and "
                         f"{min(only_in_one)} is only among one of them: give the data that it was finetuned on.")


def describe(path):
    """What a checkpoint tells of itself: the arguments of ours that size its model, its classes (None if it names
    none), and whether it holds an average of the weights.
    """
    checkpoint = read_checkpoint(path)
    made = checkpoint.get("args")
    known = isinstance(made, dict) and made.get("model") in MODELS
    sizes = {name: made[name] for name in ("model", "image_size", "patch_size", "pool") if known and name in made}
    return sizes, checkpoint.get("classes"), "model_ema" in checkpoint


# ----------------------------------------------------------------------------------------------------------------------


def get_args(**evaluated):
    """The arguments. Those of the checkpoint to evaluate, if any, are then defaults."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", metavar="DIR", help="train/CLASS/* and val/CLASS/*. Without it, the demonstration")
    parser.add_argument("--init", metavar="CKPT", help="pretrained weights, a file or URL. Without it, or "
                        "with none, from scratch; the demonstration looks for its own pretraining first")
    parser.add_argument("--eval", metavar="CKPT", help="evaluate these weights, a file or URL, on val/ and stop; of "
                        "our own, the model's size and pooling are known")
    add_common_arguments(parser, out="runs/finetune", image_size=224, epochs=100, blr=5e-4, batch_size=1024)
    parser.add_argument("--pool", choices=["mean", "cls"], default="mean", help="what the classifier reads")
    parser.add_argument("--min_lr", type=float, default=1e-6, help="learning rate at the end")
    parser.add_argument("--layer_decay", type=float, default=0.65, help="of the learning rate, from layer to layer")
    parser.add_argument("--drop_path", type=float, default=0.1, help="rate that stochastic depth rises to")
    parser.add_argument("--ema_decay", type=float, default=0.99992, help="of the average of the weights")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--mixup", type=float, default=0.8, help="alpha; 0 for none")
    parser.add_argument("--cutmix", type=float, default=1.0, help="alpha; 0 for none")
    parser.add_argument("--crop_scale", type=float, default=0.08, help="smallest share of an image that a crop shows")
    parser.add_argument("--augment", type=float, default=9, help="magnitude of RandAugment; 0 for none")
    parser.add_argument("--erasing", type=float, default=0.25, help="probability of random erasing")
    parser.set_defaults(**evaluated)
    args = parse_args(parser, {**DEMONSTRATION, **evaluated}, RECIPES)
    with bad_input():
        for name in ("layer_decay", "ema_decay", "smoothing", "crop_scale", "erasing"):
            if not 0 <= getattr(args, name) <= 1:
                raise ValueError(f"--{name} is from 0 to 1, not {getattr(args, name)}.")
        for name in ("min_lr", "mixup", "cutmix", "augment"):
            if not 0 <= getattr(args, name) < math.inf:
                raise ValueError(f"--{name} must be 0 or more, not {getattr(args, name)}.")
        if not args.eval and args.min_lr > args.blr * args.batch_size / 256:
            raise ValueError(f"--min_lr {args.min_lr:g} is above the peak learning rate, --blr x --batch_size / 256 = "
                             f"{args.blr * args.batch_size / 256:g}.")
        if (args.mixup or args.cutmix) and args.batch_size // (process()[1] * args.accum_steps) % 2:
            raise ValueError("Mixup and CutMix mix pairs: --batch_size must be an even number on each process and "
                             "accumulation step.")
    return args


def main():
    args = get_args()
    device = start_processes(args.device)
    if args.eval:
        with bad_input():
            sizes, its_classes, has_ema = from_first_process(lambda: describe(args.eval))
        args = get_args(**sizes)
    rank, processes = process()
    first = rank == 0
    demonstration = args.data is None
    if first and demonstration:
        print("Demonstration: a classifier of small drawn images, ten classes. For a real run, give --data.")

    # Data
    with bad_input():
        if demonstration:
            train, val = Drawings(args.drawings, args.image_size, seed=1), Drawings(500, args.image_size, seed=2)
            classes = train.classes
        else:
            classes, *names = from_first_process(lambda: find_images(args.data, args.eval))
            train, val = (ImageFiles(os.path.join(args.data, part), part_names, classes)
                          for part, part_names in zip(("train", "val"), names))
    train_set = Images(train, train_transform(args), args.seed)
    val_set = Images(val, eval_transform(args.image_size), replace=False)
    steps_per_epoch = len(train) // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    # Model
    torch.manual_seed(args.seed)
    with bad_input():
        model = ARMClassifier(args.image_size, args.patch_size, **MODELS[args.model], num_classes=len(classes),
                              drop_path=args.drop_path, pool=args.pool)
    prepare(model, args)
    if args.eval:
        with bad_input():
            check_classes(args.eval, its_classes, classes)
        return evaluate_checkpoint(args, model.to(device), has_ema, val_set, device)
    with bad_input():
        from_first_process(lambda: check_run(args, len(train)))
        if demonstration and args.init is None and os.path.exists("runs/demo_pretrain/last.pth"):
            args.init = "runs/demo_pretrain/last.pth"
        args.init = args.init or "none"
        checkpoint = resume_checkpoint(args, model, len(train))
        if checkpoint:
            check_classes(args.resume or args.out, checkpoint.get("classes"), classes)
        if args.init != "none" and not checkpoint:
            from_first_process(lambda: load_weights(model, args.init))  # the others receive them from DDP
    ddp = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    ema.update_parameters(model)  # the first call copies: the average starts from the initial weights
    prepare(ema.module, args)
    best = -1.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ema.module.load_state_dict(checkpoint["model_ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        best = checkpoint["best"]
    progress = Progress(args, train, steps_per_epoch, device, checkpoint["run"] if checkpoint else {},
                        model)
    del checkpoint  # which is large
    if first:
        parameters = sum(p.numel() for p in model.parameters())
        start = "scratch" if args.init == "none" else args.init
        tqdm.write(f"{args.model} from {start}, {parameters:,} parameters; {len(train):,} training and {len(val):,} "
                   f"validation images of {len(classes)} classes, {args.epochs} epochs of {steps_per_epoch} steps, "
                   f"from step {progress.step}; {processes} x {device.type}; to {args.out}")

    # Training
    batches = iter(make_loader(train_set, Batches(len(train), args, progress.step), args, device))
    micro_batch = args.batch_size // (processes * args.accum_steps)
    while progress.step < total_steps:
        lr = learning_rate(progress.step, args.blr * args.batch_size / 256, args.warmup_epochs * steps_per_epoch,
                           total_steps, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Drawn for the whole batch on every process, so that it does not matter which of them has an image.
        generator = torch.Generator().manual_seed(seed_of(args.seed, "drop_path", progress.step))
        drop_path = model.draw_drop_path(args.batch_size, generator)
        mixing = draw_mixing(args.batch_size // 2, args.image_size, args.mixup, args.cutmix,
                             seed_of(args.seed, "mixing", progress.step))
        loss, unreadable = torch.zeros((), device=device), []
        for micro_step in range(args.accum_steps):
            start = (rank * args.accum_steps + micro_step) * micro_batch
            images, labels, bad = next(batches)
            images = normalize(images, device)
            targets = F.one_hot(labels.to(device, non_blocking=True), len(classes)).float()
            if args.mixup or args.cutmix:
                images, targets = mix(images, targets, move(mixing[start // 2 : (start + micro_batch) // 2], device))
            branch_scale = move(drop_path[start : start + micro_batch], device) if args.drop_path else None
            last = micro_step == args.accum_steps - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = ddp(images, branch_scale)
                micro_loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing) / args.accum_steps
                micro_loss.backward()
            loss += micro_loss.detach()
            unreadable += bad.tolist()
        loss, dropped = optimizer_step(ddp, optimizer, loss)
        ema.update_parameters(model)
        interrupted = progress.after_step(loss, dropped, unreadable, lr)

        epoch, inside_epoch = divmod(progress.step, steps_per_epoch)
        weights = {}
        if interrupted or not inside_epoch or progress.checkpoint_due():
            weights = dict(model=model.state_dict(), model_ema=ema.module.state_dict(), classes=classes, epoch=epoch)
        if not inside_epoch:
            top1, top5, val_loss, left_out = evaluate(model, val_set, args, device)
            ema_top1, ema_top5, ema_loss, _ = evaluate(ema.module, val_set, args, device)
            progress.end_epoch(lr, top1=top1, top5=top5, val_loss=val_loss, ema_top1=ema_top1, ema_top5=ema_top5,
                               ema_val_loss=ema_loss, unreadable_val_images=len(left_out))
            for i in left_out:
                progress.name_unreadable(os.path.join("val", val.name(i)), "it is left out of the evaluation")
            if max(top1, ema_top1) > best:
                best = max(top1, ema_top1)
                if first:
                    save_checkpoint(os.path.join(args.out, "best.pth"), dict(weights, best=best, args=vars(args)))
        if weights:
            progress.save(dict(weights, optimizer=optimizer.state_dict(), best=best))
        if interrupted:
            progress.stop_interrupted()

    progress.bar.close()
    if first:
        print(f"Done: the best top-1 accuracy, of the weights or their average, was {best:.2f}%: {args.out}/best.pth;"
              f" the last weights in {args.out}/last.pth, every epoch's results in {args.out}/log.jsonl.")


def evaluate_checkpoint(args, model, has_ema, val_set, device):
    """Print the accuracy of a checkpoint's weights and, where it has one, of their average."""
    for ema in (False, True) if has_ema else (False,):
        with bad_input():
            if "head" in from_first_process(lambda: load_weights(model, args.eval, ema)):
                raise ValueError(f"{args.eval} has no classifier of {model.head.out_features} classes, as the images "
                                 f"have: --eval takes what finetuning on such images has made.")
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        top1, top5, loss, left_out = evaluate(model, val_set, args, device)
        if process()[0] == 0:
            print(f"{'EMA' if ema else 'Model'}: top-1 {top1:.2f}%, top-5 {top5:.2f}%, loss {loss:.4f} over "
                  f"{len(val_set) - len(left_out):,} images")
    if process()[0] == 0:
        for i in left_out:
            print(f"Cannot decode {os.path.join('val', val_set.source.name(i))}: it is left out.")


if __name__ == "__main__":
    run(main)
