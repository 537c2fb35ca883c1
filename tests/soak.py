"""Kill runs at random moments, resume them, and compare with a run left alone: python tests/soak.py [kills]."""

import random
import sys
import tempfile
import time
from pathlib import Path

from conftest import Running, same_weights, script, write_images

TINY = ["--image_size", 16, "--patch_size", 4, "--batch_size", 8, "--model", "arm_tiny", "--workers", 1,
        "--warmup_epochs", 1, "--device", "cpu"]
PRETRAIN = [*TINY, "--cluster_size", 2, "--epochs", 6]
FINETUNE = [*TINY, "--epochs", 3, "--drop_path", 0.2, "--ema_decay", 0.5]


def survive(name, arguments, folder, kills, seed=0):
    """Run a script to its end once left alone and once killed `kills` times. Returns both last.pth."""
    chance = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    started = time.monotonic()
    code, output = script(name, *arguments, "--out", alone)
    seconds = time.monotonic() - started
    assert code == 0, output
    for kill in range(kills):
        run = Running(name, *arguments, "--out", killed, "--checkpoint_minutes", 0)
        run.process.join(chance.uniform(0, seconds))
        run.process.kill()
        run.process.join()
    code, output = script(name, *arguments, "--out", killed, "--checkpoint_minutes", 0)
    assert code == 0, output
    return alone / "last.pth", killed / "last.pth"


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "images"
        for i, name in enumerate(("cat", "dog")):
            write_images(data / "train" / name, 12, seed=i)
            write_images(data / "val" / name, 4, seed=10 + i)
        for name, arguments in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
            started = time.monotonic()
            paths = survive(name, [*arguments, "--data", data], Path(scratch) / name, kills)
            same = same_weights(*paths) and (name == "pretrain" or same_weights(*paths, part="model_ema"))
            print(f"{name}: {kills} kills in {time.monotonic() - started:.0f} s; the final weights are "
                  f"{'bit-identical to' if same else 'DIFFERENT from'} those of the run left alone")
