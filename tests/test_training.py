"""pretrain.py and finetune.py: the recipe, the same result on any number of processes, and what failures do."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, free_port, processes, same_weights, script, weights, write_images
from soak import FINETUNE, PRETRAIN, TINY, survive

import finetune
import pretrain
from pretrain import learning_rate


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def epochs_of(out):
    return [entry for entry in log(out) if "epoch" in entry]


def close(a, b, part="model"):
    """Whether two checkpoints hold the same weights to float tolerance, for weights that have moved by about 1e-2."""
    a, b = weights(a, part), weights(b, part)
    return a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4


# The recipe


def test_the_schedule_warms_up_from_zero_and_falls_by_half_a_cosine():
    def rate(step):
        return learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110, minimum=0.5)

    assert [rate(0), rate(5), rate(10)] == [0, 1, 2]
    assert rate(60) == pytest.approx(1.25) and rate(110) == pytest.approx(0.5)
    assert rate(35) == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("module, argv, expected", [
    (pretrain, [], dict(epochs=1600, batch_size=2048, blr=1.5e-4, weight_decay=0.05, warmup_epochs=5, clip_grad=3.0)),
    (pretrain, ["--model", "arm_large"], dict(epochs=1600, batch_size=1024)),
    (pretrain, ["--model", "arm_huge"], dict(epochs=800, batch_size=512)),
    (pretrain, ["--model", "arm_huge", "--epochs", "7"], dict(epochs=7, batch_size=512)),
    (finetune, [], dict(epochs=100, batch_size=1024, blr=5e-4, layer_decay=0.65, drop_path=0.1, ema_decay=0.99992,
                        mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, augment=9, min_lr=1e-6, pool="mean")),
    (finetune, ["--model", "arm_large"], dict(layer_decay=0.75, drop_path=0.3))])
def test_the_defaults_are_the_papers_recipe(monkeypatch, module, argv, expected):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--data", "somewhere", *argv])
    args = vars(module.get_args())
    assert {k: args[k] for k in expected} == expected


def record_a_step(module):
    """Saves what the second step of a run is made of: what optimizer and loss are given, and how crops are drawn."""
    seen = {}

    def recording(owner, name, record):
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            record(*args, **kwargs)
            return function(*args, **kwargs)
        setattr(owner, name, wrapper)

    def on_step(model, optimizer, loss, clip_grad=math.inf):
        names = {id(p): k.removeprefix("module.") for k, p in model.named_parameters()}
        seen["clip_grad"] = clip_grad
        seen["parameters"] = {names[id(p)]: {k: group[k] for k in ("lr", "betas", "weight_decay")}
                              for group in optimizer.param_groups for p in group["params"]}
        seen["steps"] = seen.get("steps", 0) + 1
        if seen["steps"] == 2:
            torch.save(seen, os.environ["RECORD"])

    def on_loss(logits, targets, **kwargs):
        if targets.ndim == 2:  # not in evaluation
            seen.update(targets=targets.detach().clone(), label_smoothing=kwargs.get("label_smoothing"))

    def on_crop(size, scale, interpolation):
        seen.update(crop=(size, scale, interpolation.value))

    recording(module, "optimizer_step", on_step)
    recording(module.F, "cross_entropy", on_loss)
    recording(module.v2, "RandomResizedCrop", on_crop)


def a_recorded_step(name, arguments, images, tmp_path):
    """The record of step 2 of 4, the warm-up being two steps, with --blr 1 and a batch of 8."""
    code, output = script(name, *TINY, "--epochs", 2, "--workers", 0, "--blr", 1, "--data", images, "--out",
                          tmp_path / "out", *arguments, env=dict(RECORD=str(tmp_path / "record")), before=record_a_step)
    assert code == 0, output
    return torch.load(tmp_path / "record")


def test_a_pretraining_step_is_that_of_the_recipe(images, tmp_path):
    step = a_recorded_step("pretrain", ["--cluster_size", 2], images, tmp_path)
    assert step["clip_grad"] == 3.0 and step["crop"] == (16, (0.2, 1), "bicubic")
    rate = 0.5 * 8 / 256  # half of the warm-up, of --blr x batch / 256
    model = pretrain.ARM(16, 4, 2, **pretrain.MODELS["arm_tiny"], decoder_dim=128)
    assert step["parameters"] == {name: dict(lr=rate, betas=(0.9, 0.95), weight_decay=0.05 if p.ndim > 1 else 0.0)
                                  for name, p in model.named_parameters()}


def test_a_finetuning_step_is_that_of_the_recipe(images, tmp_path):
    step = a_recorded_step("finetune", [], images, tmp_path)
    assert step["clip_grad"] == math.inf and step["crop"] == (16, (0.08, 1), "bicubic")
    assert step["label_smoothing"] == 0.1
    assert step["targets"].shape == (8, 2) and (step["targets"].sum(1) - 1).abs().max() < 1e-6
    assert ((step["targets"] > 0.01) & (step["targets"] < 0.99)).any()  # mixed
    rates = {name: p["lr"] / (0.5 * 8 / 256) for name, p in step["parameters"].items()}
    assert rates["head.bias"] == rates["norm.weight"] == 1 and rates["layers.5.mlp.w1.weight"] == pytest.approx(0.65)
    assert rates["layers.0.norm1.bias"] == pytest.approx(0.65**6) and rates["pos_embed"] == pytest.approx(0.65**7)
    assert {p["betas"] for p in step["parameters"].values()} == {(0.9, 0.999)}
    undecayed = {name for name, p in step["parameters"].items() if p["weight_decay"] == 0}
    assert {"cls_token", "pos_embed", "head.bias"} <= undecayed and "layers.0.mixer.in_proj.weight" not in undecayed


@pytest.mark.parametrize("processes, accum_steps, compiled", [
    (1, 1, {"ARM": "reduce-overhead"}),
    (1, 2, {"ARM": None}),  # gradients to be added to must not lie in a CUDA graph's memory
    (2, 1, {"Block": None, "DecoderBlock": None}),  # so that DDP sends gradients block by block
])
def test_what_is_compiled_and_where_cuda_graphs_are_used(monkeypatch, processes, accum_steps, compiled):
    called = {}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: called.update(
        {type(self).__name__: options["mode"]}))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    model = pretrain.ARM(16, 8, 1, dim=16, depth=2, decoder_dim=64, decoder_depth=1)
    with torch._dynamo.config.patch(optimize_ddp=True), torch._functorch.config.patch(activation_memory_budget=1.0):
        pretrain.prepare(model, SimpleNamespace(compile=1, accum_steps=accum_steps, activation_checkpointing=True))
    assert called == compiled and model.activation_checkpointing


def ranked_logits(n):
    """Logits of 7 classes that rank the class of image i, which is i % 7, at place i % 6."""
    logits = torch.zeros(n, 7)
    for i in range(n):
        order = [i % 7] if i % 6 == 0 else [(i + k) % 7 for k in range(1, i % 6 + 1)] + [i % 7]
        for place, c in enumerate(order):
            logits[i, c] = 10.0 - place
    return logits


def test_evaluation_counts_every_image_once_and_leaves_out_the_unreadable(monkeypatch):
    logits = ranked_logits(150)  # in three batches

    class Stub(torch.nn.Module):
        def forward(self, images):
            return logits[(images[:, 0, 0, 0] * 0.229 + 0.485).mul(255).round().long()]

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 150

        def __getitem__(self, key):
            label, unreadable = (-1, 9) if key[1] == 9 else (key[1] % 7, -1)
            return torch.full((3, 1, 1), key[1], dtype=torch.uint8), label, unreadable

    monkeypatch.setattr(finetune.dist, "all_reduce", lambda t: None)
    monkeypatch.setattr(finetune, "gather", lambda mine: mine)
    args = SimpleNamespace(batch_size=1, accum_steps=1, workers=0)
    top1, top5, loss, left_out = finetune.evaluate(Stub(), Data(), args, torch.device("cpu"))
    assert left_out == [9]
    assert top1 == pytest.approx(100 * 25 / 149)  # images 0, 6, 12, ...
    assert top5 == pytest.approx(100 * 124 / 149)  # all but 5, 11, 17, ..., at place 6
    readable = torch.arange(150) != 9
    expected = torch.nn.functional.cross_entropy(logits[readable], (torch.arange(150) % 7)[readable])
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def record_averages(module):
    update, seen = module.AveragedModel.update_parameters, []

    def recording(self, model):
        update(self, model)
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        torch.save(seen, os.environ["RECORD"])

    module.AveragedModel.update_parameters = recording


def test_the_average_follows_every_step_from_the_initial_weights(images, tmp_path):
    code, output = script("finetune", *FINETUNE, "--data", images, "--epochs", 2, "--out", tmp_path,
                          env=dict(RECORD=str(tmp_path / "record")), before=record_averages)
    assert code == 0, output
    initial, *steps = torch.load(tmp_path / "record")
    assert len(steps) == 4
    average = initial
    for step in steps:
        average = {k: 0.5 * average[k] + 0.5 * step[k] for k in average}
    stored = weights(tmp_path / "last.pth", "model_ema")
    for k in average:
        torch.testing.assert_close(stored[k], average[k])
    assert any((stored[k] != step[k]).any() for k in stored)


# The demonstrations, and the same result however a batch is split


def validate_on_64_drawings(module):
    draw = module.Drawings
    module.Drawings = lambda n, size, seed: draw(min(n, 64), size, seed)


def test_both_demonstrations_run_end_to_end(tmp_path):
    tiny = ["--epochs", 1, "--warmup_epochs", 0, "--drawings", 64]
    code, output = script("pretrain", *tiny, "--out", tmp_path / "pre")
    assert code == 0 and output.startswith("Demonstration") and "finetune.py" in output.splitlines()[-1], output
    assert (tmp_path / "pre" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    code, output = script("finetune", *tiny, "--init", tmp_path / "pre" / "last.pth", "--out", tmp_path / "fine",
                          before=validate_on_64_drawings)
    assert code == 0 and output.startswith("Demonstration") and "best top-1" in output, output
    entry = epochs_of(tmp_path / "fine")[-1]
    assert {"top1", "top5", "ema_top1", "ema_top5", "loss", "lr"} <= entry.keys()
    code, output = script("finetune", "--eval", tmp_path / "fine" / "last.pth", before=validate_on_64_drawings)
    assert code == 0 and f"Model: top-1 {entry['top1']:.2f}%" in output and "EMA: top-1" in output, output


@pytest.mark.parametrize("name, arguments", [("pretrain", [*PRETRAIN, "--epochs", 2]),
                                             ("finetune", [*FINETUNE, "--epochs", 2])])
def test_two_processes_and_split_batches_compute_what_one_process_does(images, alone, tmp_path, name, arguments):
    one = alone(name, arguments)
    arguments = [*arguments, "--data", images]
    code, output = script(name, *arguments, "--accum_steps", 2, "--out", tmp_path / "split")
    assert code == 0, output
    for run in processes(name, *arguments, "--out", tmp_path / "two"):
        code, output = run.wait()
        assert code == 0, output
    for other in ("split", "two"):
        assert close(one / "last.pth", tmp_path / other / "last.pth")
        for a, b in zip(epochs_of(one), epochs_of(tmp_path / other)):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a.get("top1") == b.get("top1")
            assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=1e-4)


# Interruption


@pytest.mark.parametrize("name, arguments", [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_a_run_killed_ten_times_at_random_ends_bit_identical_to_one_left_alone(images, tmp_path, name, arguments):
    ends = survive(name, [*arguments, "--data", images], tmp_path, kills=10)
    assert all(ends), ends
    alone, killed = tmp_path / "alone" / "last.pth", tmp_path / "killed" / "last.pth"
    assert same_weights(alone, killed)
    assert name == "pretrain" or same_weights(alone, killed, "model_ema")
    lines = epochs_of(tmp_path / "killed")
    assert [entry["epoch"] for entry in lines] == list(range(1, len(epochs_of(tmp_path / "alone")) + 1))
    assert [e["loss"] for e in lines] == [e["loss"] for e in epochs_of(tmp_path / "alone")]


def die_while_saving(module):
    """The second checkpoint of each run is half written when the process dies."""
    import io
    save, saved = torch.save, []

    def dying(checkpoint, file):
        saved.append(1)
        if len(saved) < 2:
            return save(checkpoint, file)
        buffer = io.BytesIO()
        save(checkpoint, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


def test_dying_while_a_checkpoint_is_written_leaves_the_one_before(images, tmp_path):
    arguments = [*PRETRAIN, "--epochs", 3, "--data", images, "--checkpoint_minutes", 0]
    code, output = script("pretrain", *arguments, "--out", tmp_path / "alone")
    assert code == 0, output
    for attempt in range(10):
        code, output = script("pretrain", *arguments, "--out", tmp_path / "dying", before=die_while_saving)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        weights(tmp_path / "dying" / "last.pth")  # whole
    assert code == 0 and attempt == 5  # six steps, one more saved by each run
    assert same_weights(tmp_path / "alone" / "last.pth", tmp_path / "dying" / "last.pth")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_an_epoch_saves_and_asks_to_be_requeued_and_one_process_continues_what_two_began(
        images, tmp_path, signum):
    arguments = [*PRETRAIN, "--data", images, "--epochs", 12, "--warmup_epochs", 4]
    runs = processes("pretrain", *arguments, "--out", tmp_path / "stopped")
    while len(log(tmp_path / "stopped") if (tmp_path / "stopped" / "log.jsonl").exists() else []) < 2:
        time.sleep(0.05)
    for run in runs:
        os.kill(run.pid, signum)
    for rank, run in enumerate(runs):
        code, output = run.wait()
        assert code == 75, output
        assert ("Interrupted at step" in output) == (rank == 0) and "Traceback" not in output, output
    step = torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["run"]["step"]
    assert 4 <= step < 24
    code, output = script("pretrain", *arguments, "--out", tmp_path / "stopped")
    assert code == 0 and f"from step {step}" in output, output
    assert len(epochs_of(tmp_path / "stopped")) == 12


def test_the_log_is_whole_lines_after_any_crash(alone, tmp_path):
    before = (alone("pretrain", PRETRAIN) / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(before + b'{"epoch": 7, "lo')
    descriptor, logged = pretrain.open_log(str(tmp_path / "log.jsonl"))
    os.close(descriptor)
    assert (tmp_path / "log.jsonl").read_bytes() == before and logged == {1, 2, 3, 4, 5, 6}
    (tmp_path / "log.jsonl").write_bytes(b"?\n" + before + bytes(9) + b"\n")  # as after a loss of power
    os.close(pretrain.open_log(str(tmp_path / "log.jsonl"))[0])
    assert (tmp_path / "log.jsonl").read_bytes() == b"?\n" + before


def small_disk(module):
    """No file may grow past 100 kB: what a full disk looks like to a checkpoint, and not to the log."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_the_last_checkpoint(images, tmp_path):
    arguments = [*PRETRAIN, "--data", images, "--out", tmp_path]
    code, output = script("pretrain", *arguments, before=stop_after_three_steps)
    assert code == 75, output
    before = (tmp_path / "last.pth").read_bytes()
    code, output = script("pretrain", *arguments, before=small_disk)
    assert code == 1 and f"Cannot write {tmp_path}/last.pth" in output and "Traceback" not in output, output
    assert (tmp_path / "last.pth").read_bytes() == before and not (tmp_path / "last.pth.new").exists()


def stop_after_three_steps(module):
    after_step = module.Progress.after_step

    def stopping(self, *args):
        if self.step == 2:
            self.interrupted = True
        return after_step(self, *args)

    module.Progress.after_step = stopping


# Losses that are not finite, and files that cannot be decoded


def nan_at_steps_2_and_3(module):
    calls, compute = [], module.ARM.forward

    def forward(self, images):
        calls.append(1)
        bad = len(calls) in (2, 3) and os.environ.get("RANK", "0") == "0"  # on one process of two
        return compute(self, images) + (math.nan if bad else 0)

    module.ARM.forward = forward


def nan_from_step_3_on(module):
    calls, compute = [], module.ARM.forward

    def forward(self, images):
        calls.append(1)
        return compute(self, images) * (math.nan if len(calls) > 2 else 1)

    module.ARM.forward = forward


def test_a_step_whose_loss_is_not_finite_is_dropped_on_every_process_and_counted(images, tmp_path):
    arguments = [*PRETRAIN, "--data", images]
    for run in processes("pretrain", *arguments, "--out", tmp_path / "two", before=nan_at_steps_2_and_3):
        code, output = run.wait()
        assert code == 0, output
    code, output = script("pretrain", *arguments, "--out", tmp_path / "one", before=nan_at_steps_2_and_3)
    assert code == 0, output
    assert [entry["dropped_steps"] for entry in epochs_of(tmp_path / "two")] == [1, 1, 0, 0, 0, 0]
    assert all(math.isfinite(entry["loss"]) for entry in epochs_of(tmp_path / "two"))
    assert close(tmp_path / "one" / "last.pth", tmp_path / "two" / "last.pth")


def test_a_loss_that_stays_not_finite_stops_the_run_and_keeps_the_last_checkpoint(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--epochs", 20, "--out", tmp_path,
                          before=nan_from_step_3_on)
    assert code == 1 and "not finite 10 steps in a row, up to step 12" in output and "Traceback" not in output, output
    assert all(v.isfinite().all() for v in weights(tmp_path / "last.pth").values())


def test_a_corrupt_file_is_named_once_and_too_many_stop_the_run(tmp_path):
    write_images(tmp_path / "data", 120)
    (tmp_path / "data" / "07.png").write_bytes(b"\x89PNG, but no more")
    arguments = [*TINY, "--cluster_size", 2, "--data", tmp_path / "data", "--batch_size", 24, "--epochs", 2]
    for run in processes("pretrain", *arguments, "--out", tmp_path / "one"):
        code, output = run.wait()
        assert code == 0, output
    assert [entry["unreadable"] for entry in log(tmp_path / "one") if "unreadable" in entry] == ["07.png"]
    assert epochs_of(tmp_path / "one")[-1]["unreadable_images"] == 1
    (tmp_path / "data" / "08.png").write_bytes(b"")
    code, output = script("pretrain", *arguments, "--out", tmp_path / "two")
    assert code == 1 and "2 of 120 images cannot be decoded, more than 1%" in output, output
    assert "Traceback" not in output, output


def test_a_corrupt_file_of_val_is_left_out_and_named_once(images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "val" / "dog" / "03.png").write_bytes(b"")
    for run in processes("finetune", *FINETUNE, "--epochs", 2, "--data", tmp_path / "data", "--out", tmp_path / "out"):
        code, output = run.wait()
        assert code == 0, output
    assert [e["unreadable"] for e in log(tmp_path / "out") if "unreadable" in e] == [os.path.join("val", "dog/03.png")]
    assert [entry["unreadable_val_images"] for entry in epochs_of(tmp_path / "out")] == [1, 1]
    code, output = script("finetune", *FINETUNE, "--data", tmp_path / "data", "--eval", tmp_path / "out" / "last.pth")
    assert code == 0 and "over 10 images" in output and "Cannot decode val/dog/03.png" in output, output


def test_a_folder_of_nothing_but_corrupt_files_stops_the_run_with_a_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(16):
        (tmp_path / "data" / f"{i}.jpg").write_bytes(b"not a photograph")
    code, output = script("pretrain", *PRETRAIN, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert code == 1 and "8 of 16 images cannot be decoded" in output and "Traceback" not in output, output


def kill_a_loader_worker():
    import multiprocessing
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(10)  # in which torch's handler of SIGCHLD raises, as it may anywhere


def kill_a_loader_worker_in_an_epoch(module):
    after_step = module.Progress.after_step

    def killing(self, *args):
        if self.step == 2:
            kill_a_loader_worker()
        return after_step(self, *args)

    module.Progress.after_step = killing


def kill_a_loader_worker_while_saving(module):
    torch.save = lambda *args: kill_a_loader_worker()


@pytest.mark.parametrize("before", [
    kill_a_loader_worker_in_an_epoch,
    kill_a_loader_worker_while_saving])
def test_a_dead_loader_worker_ends_the_run_with_a_sentence(images, tmp_path, before):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--epochs", 200, "--out", tmp_path, before=before)
    assert code == 1 and "data loader worker died" in output and "Traceback" not in output, output


def fault_at_step_2(module):
    """What no sentence is for: a fault of the program, or of the GPU."""
    def after_step(self, *args):
        raise RuntimeError("an illegal memory access")

    module.Progress.after_step = after_step


def test_a_fault_ends_every_process_with_its_traceback_and_no_hang(images, tmp_path):
    for run in processes("finetune", *FINETUNE, "--data", images, "--out", tmp_path, before=fault_at_step_2):
        code, output = run.wait(60)
        assert code == 1 and "an illegal memory access" in output and "Traceback" in output, output


def fault_in_a_loader_worker(module):
    def transform(image):
        raise RuntimeError("a genuine fault")

    module.v2.Compose = lambda transforms: transform


def test_a_fault_in_a_loader_worker_is_told_as_it_is(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--out", tmp_path, before=fault_in_a_loader_worker)
    assert code == 1 and "a genuine fault" in output and "want of memory" not in output, output


def want_memory(module):
    module.ARM.forward = lambda self, images: images.new_empty(10**15)


def test_want_of_memory_ends_the_run_with_a_sentence(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--out", tmp_path, before=want_memory)
    assert code == 1 and "Out of memory: use fewer --workers" in output and "Traceback" not in output, output


# torchrun


def torchrun(*arguments):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS="1"))


def worker_pids(out):
    """Processes of ours that train into a folder and are rank 1, read from /proc."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open(f"/proc/{pid}/cmdline").read()
            rank_1 = "\0RANK=1\0" in open(f"/proc/{pid}/environ").read()
            if rank_1 and str(out) in command and "torch.distributed" not in command:
                yield int(pid)
        except OSError:
            pass


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds the worker to kill in /proc")
def test_torchrun_restarts_a_killed_worker_from_the_last_checkpoint(images, alone, tmp_path):
    arguments = [*PRETRAIN, "--epochs", 12, "--workers", 0]
    run = torchrun("--standalone", "--nproc_per_node", 2, "--max-restarts", 2, "pretrain.py", *arguments, "--data",
                   images, "--out", tmp_path / "killed")
    while not (tmp_path / "killed" / "last.pth").exists():
        time.sleep(0.1)
        assert run.poll() is None, run.stdout.read()
    os.kill(next(worker_pids(tmp_path / "killed")), signal.SIGKILL)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("from step") == 2, output
    assert close(alone("pretrain", arguments) / "last.pth", tmp_path / "killed" / "last.pth")


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds the worker to kill in /proc")
def test_two_nodes_train_together_and_go_on_after_a_worker_of_one_is_killed(images, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as the README says
    arguments = [*PRETRAIN, "--epochs", 12, "--workers", 0]
    rendezvous = ["--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 2, "--rdzv_backend", "c10d",
                  "--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", os.getpid()]
    out = tmp_path / "two"
    nodes = [torchrun(*rendezvous, "pretrain.py", *arguments, "--data", images, "--out", out) for _ in range(2)]
    while not (out / "last.pth").exists():
        time.sleep(0.1)
        ended = [node for node in nodes if node.poll() is not None]
        assert not ended, ended[0].stdout.read()
    os.kill(next(worker_pids(out)), signal.SIGKILL)
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), outputs
    assert "".join(outputs).count("from step") == 2, outputs
    assert close(alone("pretrain", arguments) / "last.pth", out / "last.pth")


# Bad input


@pytest.mark.parametrize("name, arguments, sentence", [
    ("pretrain", ["--data", "/nowhere"], "There is no folder /nowhere"),
    ("pretrain", ["--data", "EMPTY"], "There are no images in"),
    ("pretrain", ["--image_size", 50], "do not tile an image of 50x50"),
    ("pretrain", ["--cluster_size", 4], "do not tile 6x6 patches"),
    ("pretrain", ["--batch_size", 10, "--accum_steps", 4], "--batch_size 10 does not divide into 1 processes x 4"),
    ("pretrain", ["--data", "IMAGES", "--batch_size", 64, "--model", "arm_tiny"], "more than the 16 training images"),
    ("pretrain", ["--epochs", 0], "--epochs must be at least 1"),
    ("pretrain", ["--epochs", 1], "--warmup_epochs 1 leaves nothing"),
    ("pretrain", ["--blr", "nan"], "--blr must be 0 or more"),
    ("pretrain", ["--clip_grad", 0], "--clip_grad must be more than 0"),
    ("pretrain", ["--epochs", "many"], "invalid int value"),
    ("pretrain", ["--model", "arm_gigantic"], "invalid choice"),
    ("pretrain", ["--resume", "/nowhere.pth"], "cannot read the checkpoint /nowhere.pth"),
    ("pretrain", ["--resume", "GOLDEN"], "not a checkpoint that a run can continue from"),
    ("pretrain", ["--out", "/proc/nothing"], "Cannot write to --out"),
    ("pretrain", ["--device", "cuda"], "--device cuda needs a GPU"),
    ("finetune", ["--data", "EMPTY"], "There is no folder"),
    ("finetune", ["--data", "MORE_VAL"], "has 1 classes that"),
    ("finetune", ["--init", "GOLDEN"], "does not fit this model"),
    ("finetune", ["--init", "TEXT"], "not a checkpoint, or is damaged"),
    ("finetune", ["--eval", "GOLDEN"], "does not fit this model"),
    ("finetune", ["--eval", "PRETRAINED"], "has no classifier of 10 classes"),
    ("finetune", ["--init", "PRETRAINED", "--model", "arm_small"], "made with --model arm_tiny --image_size 48"),
    ("finetune", ["--smoothing", 2], "--smoothing is from 0 to 1"),
    ("finetune", ["--min_lr", 1], "--min_lr 1 is above the peak learning rate"),
    ("finetune", ["--image_size", 8], "one patch of 8x8 pixels is the whole image"),
    ("finetune", ["--mixup", 0.8, "--batch_size", 33], "Mixup and CutMix mix pairs")])
def test_bad_input_gives_one_sentence_and_exit_code_2(images, tmp_path, name, arguments, sentence):
    from arm import ARM, MODELS

    places = dict(EMPTY=tmp_path / "empty", IMAGES=images, MORE_VAL=tmp_path / "more", TEXT=tmp_path / "text.pth",
                  GOLDEN=ROOT / "tests" / "golden" / "official_pretrain.pth", PRETRAINED=tmp_path / "pretrained.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    if "MORE_VAL" in arguments:
        write_images(tmp_path / "more" / "train" / "cat", 1)
        write_images(tmp_path / "more" / "val" / "cat", 1)
        write_images(tmp_path / "more" / "val" / "unicorn", 1)
    if "PRETRAINED" in arguments:
        model = ARM(48, 8, 2, **MODELS["arm_tiny"], decoder_dim=128)
        torch.save(dict(model=model.state_dict(), args=dict(model="arm_tiny", image_size=48, patch_size=8)),
                   places["PRETRAINED"])
    arguments = [places.get(a, a) for a in arguments]
    arguments += ["--drawings", 64]
    if "--out" not in arguments:
        arguments += ["--out", tmp_path / "out"]
    code, output = script(name, *arguments)
    assert code == 2 and sentence in output and "Traceback" not in output, output
    assert not (tmp_path / "out" / "last.pth").exists()
    assert "do not tile" not in sentence or not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, recipe", [("pretrain", "1600"), ("finetune", "0.65")])
def test_help_tells_every_default_of_the_recipe(name, recipe):
    code, output = script(name, "--help")
    assert code == 0 and f"(default: {recipe})" in " ".join(output.split()), output


def test_two_processes_say_what_is_wrong_once(tmp_path):
    results = [run.wait() for run in processes("pretrain", "--data", "/nowhere", "--out", tmp_path)]
    assert [code for code, _ in results] == [2, 2]
    assert sum(output.count("There is no folder /nowhere") for _, output in results) == 1


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(images, tmp_path):
    pretrain.check_run(SimpleNamespace(batch_size=1, out=str(tmp_path)), images=1)  # this process is the first run
    arguments = [*PRETRAIN, "--data", images, "--epochs", 1, "--warmup_epochs", 0, "--out", tmp_path]
    results = [run.wait() for run in processes("pretrain", *arguments)]
    assert [code for code, _ in results] == [2, 2], results
    assert sum(output.count(f"Another run writes to --out {tmp_path}") for _, output in results) == 1, results
    open(tmp_path / "log.jsonl").close()  # which gives up this process's lock
    code, output = script("pretrain", *arguments)
    assert code == 0, output


def test_other_classes_than_those_finetuned_on_are_refused_even_if_as_many(images, alone, tmp_path):
    shutil.copytree(images, tmp_path / "renamed")
    for part in ("train", "val"):
        (tmp_path / "renamed" / part / "cat").rename(tmp_path / "renamed" / part / "zebra")
    arguments = [*FINETUNE, "--epochs", 2, "--data", tmp_path / "renamed", "--out", tmp_path / "out"]
    checkpoint = alone("finetune", [*FINETUNE, "--epochs", 2]) / "last.pth"
    for flag in ("--eval", "--resume"):
        code, output = script("finetune", *arguments, flag, checkpoint)
        assert code == 2 and "cat is only among one of them" in output and "Traceback" not in output, output


def test_resuming_with_another_model_or_batch_is_refused(images, alone, tmp_path):
    arguments = [*PRETRAIN, "--data", images, "--out", tmp_path]
    shutil.copy(alone("pretrain", PRETRAIN) / "last.pth", tmp_path)
    before = (tmp_path / "last.pth").read_bytes()
    for change, sentence in ((["--batch_size", 4], "was made with --batch_size 8, this run has 4"),
                             (["--cluster_size", 1], "was made with --cluster_size 2, this run has 1"),
                             (["--data", images / "val", "--batch_size", 8], "was made with 16 images")):
        code, output = script("pretrain", *arguments, *change)
        assert code == 2 and sentence in output, output
    code, output = script("finetune", *FINETUNE, "--data", images, "--resume", tmp_path / "last.pth", "--out",
                          tmp_path / "fine")
    assert code == 2 and "is a checkpoint of another model" in output, output
    assert (tmp_path / "last.pth").read_bytes() == before
