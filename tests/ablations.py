"""What the pieces are worth: pretrain and finetune with one piece changed, and print a table of accuracies.

    python tests/ablations.py cifar10 runs/ablations      # cifar10/train/CLASS/*, cifar10/val/CLASS/*

It runs the two scripts, several side by side on each GPU, on the paper's geometry (12x12 patches, 3x3 clusters) with
equal short schedules. Stopped, the same command continues; what has ended is not run again. The loss curves go to
OUT/ablations.png, for which matplotlib is needed.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from arm import ORDERS  # noqa: E402

BOTH = ["--model", "arm_tiny", "--image_size", 96, "--patch_size", 8, "--batch_size", 512, "--blr", 1e-3,
        "--warmup_epochs", 1, "--compile", 0]
PRETRAIN = ["--epochs", 5]
FINETUNE = ["--epochs", 3, "--layer_decay", 0.85, "--drop_path", 0, "--mixup", 0, "--cutmix", 0, "--augment", 0,
            "--erasing", 0, "--crop_scale", 0.5, "--ema_decay", 0.9]
ROWS = {  # what is changed: flags of pretrain.py (None: not pretrained), flags of finetune.py
    "as in the paper: clusters of 4x4, row by row, normalised pixels, 4 decoder blocks, 4 directions": ([], []),
    "no pretraining": (None, []),
    "masked prediction (MAE)": (["--objective", "mae"], []),
    **{f"clusters of {c}x{c}: {(12 // c) ** 2} units": (["--cluster_size", c], []) for c in (1, 2, 3, 6)},
    **{f"order: {order}": (["--order", order], []) for order in ORDERS if order != "row"},
    "raw pixels": (["--target", "raw"], []),
    **{f"decoder blocks: {k}": (["--decoder_depth", k], []) for k in (1, 2)},
    **{f"directions in finetuning: {k}": ([], ["--directions", k]) for k in (1, 2)},
}


def folder_of(out, seed, flags):
    return out / f"seed{seed}" / "_".join(str(flag).strip("-") for flag in flags or ["paper"])


def run(script, gpu, args, flags, seed, folder):
    """Run a script to its end; where it has been there it says that nothing is left."""
    command = [sys.executable, ROOT / f"{script}.py", "--data", args.data, "--workers", args.workers, *BOTH, *flags,
               "--seed", seed, "--out", folder]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        subprocess.run(list(map(str, command)), check=True, stdout=output, stderr=output,
                       env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=str(gpu)))


def log(folder):
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def places(out, row, seed):
    """The folders of a row's pretraining, None if there is none, and of its finetuning."""
    pretrain, finetune = ROWS[row]
    pretrained = None if pretrain is None else folder_of(out, seed, pretrain) / "pretrain"
    return pretrained, folder_of(out, seed, [*(["scratch"] if pretrain is None else pretrain), *finetune]) / "finetune"


def work(job, args):
    """A pretraining and what is finetuned from it."""
    gpu, seed, pretrain, rows = job
    for row in rows:
        pretrained, finetuned = places(args.out, row, seed)
        if len(log(finetuned)) < FINETUNE[1]:
            if pretrained:
                run("pretrain", gpu, args, [*PRETRAIN, *pretrain], seed, pretrained)
            init = ["--init", pretrained / "last.pth" if pretrained else "none"]
            run("finetune", gpu, args, [*FINETUNE, *ROWS[row][1], *init], seed, finetuned)
        print(f"seed {seed}, {row}: {log(finetuned)[-1]['top1']:.2f}%", file=sys.stderr, flush=True)


def print_table(args):
    print(f"| what is changed | {' | '.join(f'seed {seed}' for seed in range(args.seeds))} | mean |")
    print("| --- " * (args.seeds + 2) + "|")
    for row in ROWS:
        ends = [log(places(args.out, row, seed)[1])[FINETUNE[1] - 1 :] for seed in range(args.seeds)]
        tops = [end[0]["top1"] for end in ends if end]
        print(f"| {row} | {' | '.join(f'{top:.1f}%' for top in tops)} | {sum(tops) / max(len(tops), 1):.1f}% |")


def draw(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for i, row in enumerate(ROWS):
        pretrained, finetuned = places(args.out, row, 0)
        style = dict(color=plt.cm.tab20(i), label=row.split(":")[0] if i == 0 else row, lw=3 if i < 2 else 1.5)
        if pretrained and not ROWS[row][1]:
            left.plot([e["epoch"] for e in log(pretrained)], [e["loss"] for e in log(pretrained)], **style)
        right.plot([e["epoch"] for e in log(finetuned)], [e["top1"] for e in log(finetuned)], **style)
    left.set(title="Pretraining: loss (that of raw pixels and of MAE is another quantity)", xlabel="epoch")
    right.set(title="Finetuning: top-1 accuracy on the validation images, %", xlabel="epoch")
    right.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(args.out / "ablations.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=6, help="runs side by side on each GPU")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each run")
    args = parser.parse_args()
    gpus, jobs = max(1, torch.cuda.device_count()), []
    for seed in range(args.seeds):
        for pretrain in dict.fromkeys(json.dumps(flags) for flags, _ in ROWS.values()):
            rows = [row for row, (flags, _) in ROWS.items() if json.dumps(flags) == pretrain]
            jobs.append((len(jobs) % gpus, seed, json.loads(pretrain), rows))
    with ThreadPoolExecutor(args.jobs * gpus) as pool:
        list(pool.map(lambda job: work(job, args), jobs))
    print_table(args)
    draw(args)


if __name__ == "__main__":
    main()
