"""Kill runs at random moments, resume them, and compare with a run left alone: python tests/soak.py [kills]."""

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import Running, same_weights, write_images

TINY = ["--image_size", 16, "--patch_size", 4, "--batch_size", 8, "--model", "arm_tiny", "--workers", 1,
        "--warmup_epochs", 1, "--device", "cpu"]
PRETRAIN = [*TINY, "--cluster_size", 2, "--epochs", 6]
FINETUNE = [*TINY, "--epochs", 3, "--drop_path", 0.2, "--ema_decay", 0.5]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def results(out):
    """The log without times."""
    return [{k: v for k, v in entry.items() if k not in ("images_per_second", "seconds")} for entry in log(out)]


def same_end(name, a, b):
    """Whether two runs of a script ended with the same weights, bit for bit, and logged the same results."""
    parts = ["model", "model_ema"] if name == "finetune" else ["model"]
    return all(same_weights(a / "last.pth", b / "last.pth", part) for part in parts) and results(a) == results(b)


def survive(name, arguments, folder, kills, seed=0):
    """Run a script in folder/alone, and in folder/killed until `kills` kills have hit it alive: it is resumed after
    each kill, and starts over after each end. Returns, for each end, whether it is that of the run left alone.
    """
    chance = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    run, started = Running(name, *arguments, "--out", alone), time.monotonic()
    code, output = run.wait()
    seconds = time.monotonic() - started
    assert code == 0, output
    same = []
    while True:
        run = Running(name, *arguments, "--out", killed, "--checkpoint_minutes", 0)
        if kills:
            run.process.join(chance.uniform(0, 0.6 * seconds))  # start-up included: it takes several lives to the end
            run.process.kill()
        code, output = run.wait()
        if kills and code == -signal.SIGKILL:
            kills -= 1
            continue
        assert code == 0, output
        same.append(same_end(name, alone, killed))
        if not kills:
            return same
        shutil.rmtree(killed)


if __name__ == "__main__":
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "images"
        for i, name in enumerate(("cat", "dog")):
            write_images(data / "train" / name, 12, seed=i)
            write_images(data / "val" / name, 4, seed=10 + i)
        for name, arguments in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
            started = time.monotonic()
            same = survive(name, [*arguments, "--data", data], Path(scratch) / name, kills)
            seconds = time.monotonic() - started
            print(f"{name}: {kills} kills, {len(same)} runs to the end, {seconds:.0f} s; weights and results are "
                  f"{'bit-identical to' if all(same) else 'DIFFERENT from'} those of the run left alone")
