"""pretrain.py and finetune.py: the recipe, the same result on any number of processes, and what failures do."""

import csv
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Running, environment, free_port, processes, same_weights, script, weights, write_images
from PIL import Image
from soak import FINETUNE, PRETRAIN, TINY, log, results, survive

import finetune
import pretrain
from arm import BadInput
from pretrain import learning_rate


def close(a, b, part="model"):
    """Whether two checkpoints hold the same weights to float tolerance, for weights that have moved by about 1e-2."""
    a, b = weights(a, part), weights(b, part)
    return a.keys() == b.keys() and max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 1e-4


# The recipe


def test_the_schedule_warms_up_from_zero_and_falls_by_half_a_cosine():
    args = SimpleNamespace(blr=0.5, batch_size=1024, warmup_epochs=10, epochs=110)  # the peak is 2

    def rate(epoch):
        return learning_rate(epoch, args, minimum=0.5)

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
            result = function(*args, **kwargs)
            record(*args, **kwargs)
            return result
        setattr(owner, name, wrapper)

    def on_step(model, optimizer, lr, loss, clip_grad=math.inf):
        names = {id(p): k.removeprefix("module.") for k, p in model.named_parameters()}
        seen["clip_grad"] = clip_grad
        seen["parameters"] = {names[id(p)]: {k: group[k] for k in ("lr", "betas", "weight_decay")}
                              for group in optimizer.param_groups for p in group["params"]}
        seen["steps"] = seen.get("steps", 0) + 1
        if seen["steps"] == 2:
            torch.save(seen, os.environ["RECORD"])

    def on_loss(logits, targets, **kwargs):
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


def decayed(name, parameter):
    """Matrices are, and not what is a vector for each direction."""
    return parameter.ndim > 1 and not name.endswith(("_bias", ".D"))


def test_a_pretraining_step_is_that_of_the_recipe(images, tmp_path):
    step = a_recorded_step("pretrain", ["--cluster_size", 2], images, tmp_path)
    assert step["clip_grad"] == 3.0 and step["crop"] == (16, (0.2, 1), "bicubic")
    rate = 0.5 * 8 / 256  # half of the warm-up, of --blr x batch / 256
    model = pretrain.ARM(16, 4, 2, **pretrain.MODELS["arm_tiny"], decoder_dim=128)
    assert step["parameters"] == {name: dict(lr=rate, betas=(0.9, 0.95), weight_decay=0.05 if decayed(name, p) else 0.0)
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
    assert {"cls_token", "pos_embed", "head.bias", "layers.0.mixer.dt_bias", "layers.0.mixer.D"} <= undecayed
    assert "layers.0.mixer.in_proj.weight" not in undecayed


@pytest.mark.parametrize("machines, accum_steps, compiled", [
    (1, 1, {"ARM": "reduce-overhead"}),
    (1, 2, {"ARM": None}),  # gradients to be added to must not lie in a CUDA graph's memory
    (2, 1, {"Block": None, "DecoderBlock": None}),  # so that DDP sends gradients block by block
])
@pytest.mark.parametrize("of_a_machine", [1, 2])
def test_what_is_compiled_and_where_cuda_graphs_are_used(monkeypatch, of_a_machine, machines, accum_steps, compiled):
    called = {}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: called.update(
        {type(self).__name__: options["mode"]}))
    for name, value in environment(0, machines * of_a_machine, local=of_a_machine).items():
        monkeypatch.setenv(name, value)
    model = pretrain.ARM(16, 8, 1, dim=16, depth=2, decoder_dim=64, decoder_depth=1)
    with torch._dynamo.config.patch(optimize_ddp=True), torch._functorch.config.patch(activation_memory_budget=1.0):
        pretrain.prepare(model, SimpleNamespace(compile=1, accum_steps=accum_steps, activation_checkpointing=True))
    assert called == compiled and all(block.recompute for block in model.layers)


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
    monkeypatch.setattr(finetune, "union", lambda mine: mine)
    args = SimpleNamespace(batch_size=1, accum_steps=1, workers=0)
    right = torch.eye(7, dtype=torch.bool)
    results, left_out = finetune.evaluate(Stub(), Data(), args, torch.device("cpu"), right)
    assert left_out == [9]
    assert results["top1"] == pytest.approx(100 * 25 / 149)  # images 0, 6, 12, ...
    assert results["top5"] == pytest.approx(100 * 124 / 149)  # all but 5, 11, 17, ..., at place 6
    readable = torch.arange(150) != 9
    expected = torch.nn.functional.cross_entropy(logits[readable], (torch.arange(150) % 7)[readable])
    assert results["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


def record_averages(module):
    update, seen = module.AveragedModel.update_parameters, []

    def recording(self, model):
        update(self, model)
        seen.append({k: v.detach().clone() for k, v in model.named_parameters()})
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
    assert any((stored[k] != step[k]).any() for k in step)


def test_a_linear_probe_moves_head_and_norm_alone_and_without_a_decay_there_is_no_average(images, tmp_path):
    code, output = script("finetune", *FINETUNE, "--data", images, "--epochs", 2, "--layer_decay", 0, "--ema_decay", 0,
                          "--blr", 0.1, "--out", tmp_path)
    assert code == 0, output
    torch.manual_seed(0)
    before = finetune.ARMClassifier(16, 4, **pretrain.MODELS["arm_tiny"], num_classes=2).state_dict()
    after = weights(tmp_path / "last.pth")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert "model_ema" not in torch.load(tmp_path / "last.pth", weights_only=True)


def test_top5_is_for_more_than_five_classes_and_the_last_line_tells_chance_and_what_was_best(images, tmp_path):
    code, output = script("finetune", *FINETUNE, "--data", images, "--epochs", 2, "--out", tmp_path)
    assert code == 0, output
    assert "(chance: 50%)" in output.splitlines()[-1]
    assert re.search(r"of (the weights|their average) after epoch \d", output.splitlines()[-1]), output
    assert "val_loss" in log(tmp_path)[-1] and not any("top5" in name for name in log(tmp_path)[-1])
    code, output = script("finetune", "--data", images, "--eval", tmp_path / "last.pth", *TINY[-2:], "--workers", 0)
    assert code == 0 and "top-1" in output and "top-5" not in output, output


# The demonstrations, and the same result however a batch is split


def validate_on_64_drawings(module):
    draw = module.Drawings
    module.Drawings = lambda n, size, seed: draw(min(n, 64), size, seed)


def test_both_demonstrations_run_end_to_end(tmp_path):
    tiny = ["--epochs", 1, "--warmup_epochs", 0, "--drawings", 64]
    code, output = script("pretrain", *tiny, "--out", tmp_path / "pre")
    assert code == 0 and "finetune.py" in output.splitlines()[-1], output
    assert (tmp_path / "pre" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    code, output = script("finetune", *tiny, "--init", tmp_path / "pre" / "last.pth", "--out", tmp_path / "fine",
                          before=validate_on_64_drawings)
    assert code == 0 and "best top-1" in output.splitlines()[-1] and "chance: 10%" in output, output
    entry = log(tmp_path / "fine")[-1]
    assert {"top1", "top5", "ema_top1", "ema_top5", "loss", "lr"} <= entry.keys()
    code, output = script("finetune", "--eval", tmp_path / "fine" / "last.pth", before=validate_on_64_drawings)
    assert code == 0 and f"Model: top-1 {entry['top1']:.2f}%" in output and "EMA: top-1" in output, output
    assert " images/s" in output


@pytest.mark.parametrize("name, arguments", [
    ("pretrain", [*PRETRAIN, "--epochs", 2]),
    ("finetune", [*FINETUNE, "--epochs", 2, "--mixup", 0, "--cutmix", 0, "--drop_path", 0])])
def test_two_processes_and_split_batches_compute_what_one_process_does(images, alone, tmp_path, name, arguments):
    """In finetuning without mixing and stochastic depth, which are drawn for each process; the images and their crops
    are the same with them, too.
    """
    one = alone(name, arguments)
    arguments = [*arguments, "--data", images]
    code, output = script(name, *arguments, "--accum_steps", 2, "--out", tmp_path / "split")
    assert code == 0, output
    for run in processes(name, *arguments, "--out", tmp_path / "two"):
        code, output = run.wait()
        assert code == 0, output
    for other in ("split", "two"):
        assert close(one / "last.pth", tmp_path / other / "last.pth")
        for a, b in zip(log(one), log(tmp_path / other)):
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
    assert [entry["epoch"] for entry in log(tmp_path / "killed")] == list(range(1, len(log(tmp_path / "alone")) + 1))
    assert results(tmp_path / "killed") == results(tmp_path / "alone")


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
    assert code == 0 and f"now at step {step}" in output, output
    assert len(log(tmp_path / "stopped")) == 12


def signal_itself_after_epoch_2(module):
    """The first process gets a signal when all have agreed that there is none."""
    log_epoch = module.Run.log_epoch

    def signalled(self, **results):
        log_epoch(self, **results)
        if self.first and self.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    module.Run.log_epoch = signalled


@pytest.mark.parametrize("n", [1, 2])
def test_a_signal_while_results_are_written_stops_every_process_at_the_next_step_and_saves_it(images, tmp_path, n):
    for run in processes("pretrain", *PRETRAIN, "--data", images, "--out", tmp_path, n=n,
                         before=signal_itself_after_epoch_2):
        code, output = run.wait(60)
        assert code == 75, output
    assert weights(tmp_path / "last.pth", "run")["step"] == 5


@pytest.fixture
def one_process():
    pretrain.dist.init_process_group("gloo", store=pretrain.dist.HashStore(), rank=0, world_size=1)
    handlers = [(signum, signal.getsignal(signum)) for signum in (signal.SIGTERM, signal.SIGINT)]
    yield
    for signum, handler in handlers:
        signal.signal(signum, handler)
    pretrain.dist.destroy_process_group()


def small_run(out):
    """A Run of ten epochs of 40 steps in this process."""
    args = SimpleNamespace(model="none", batch_size=4, epochs=10, blr=1.0, out=str(out), init=None, resume=None,
                           compile=0, checkpoint_minutes=60)
    return pretrain.Run(args, torch.nn.Linear(1, 1), pretrain.Drawings(160, 8, seed=0), torch.device("cpu"))


def test_the_log_is_whole_lines_after_any_crash(alone, tmp_path, one_process):
    before = (alone("pretrain", PRETRAIN) / "log.jsonl").read_bytes()
    lines = before.splitlines(keepends=True)
    assert len(lines) == 6
    for damaged, mended in ((before + b'{"epoch": 7, "lo', before), (before[:-1], b"".join(lines[:5])),
                            (b"?\n" + before + bytes(9) + b"\n", b"?\n" + before)):  # as after a loss of power
        (tmp_path / "log.jsonl").write_bytes(damaged)
        run = small_run(tmp_path)
        run.step = 12
        run.start()
        run.log.close()
        assert (tmp_path / "log.jsonl").read_bytes() == mended


def die_in_epoch_3(module):
    """At step 5; no checkpoint has been written."""
    after_step = module.Run.after_step

    def dying(self, *args):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return after_step(self, *args)

    module.Run.after_step = dying


def die_in_epoch_3_with_a_checkpoint_of_epoch_2(module):
    """At step 5; a checkpoint of step 3 has been written."""
    die_in_epoch_3(module)
    after_step = module.Run.after_step

    def saving(self, *args):
        if self.step == 2:
            self.saved_at -= 3600
        return after_step(self, *args)

    module.Run.after_step = saving


@pytest.mark.parametrize("before, step", [(die_in_epoch_3, 0), (die_in_epoch_3_with_a_checkpoint_of_epoch_2, 3)])
def test_each_epochs_line_stands_once_whenever_a_run_is_killed(images, alone, tmp_path, before, step):
    left_alone = alone("pretrain", [*PRETRAIN, "--epochs", 3])
    arguments = [*PRETRAIN, "--epochs", 3, "--data", images, "--out", tmp_path]
    code, output = script("pretrain", *arguments, before=before)
    assert code == -signal.SIGKILL and [entry["epoch"] for entry in log(tmp_path)] == [1, 2], output
    code, output = script("pretrain", *arguments)
    assert code == 0 and f"now at step {step}" in output, output
    assert results(tmp_path) == results(left_alone)
    assert same_weights(tmp_path / "last.pth", left_alone / "last.pth")


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
    assert code == 1 and f"Cannot write {tmp_path}/last.pth: File too large" in output, output
    assert "Traceback" not in output, output
    assert (tmp_path / "last.pth").read_bytes() == before and not (tmp_path / "last.pth.new").exists()


def test_only_what_cannot_be_written_is_told_as_that(tmp_path):
    with pytest.raises(RuntimeError, match="not of the disk"), pretrain.writing(tmp_path / "x"):
        raise RuntimeError("not of the disk")
    with pytest.raises(pretrain.Stop, match=r"Cannot write .*/x: Is a directory"), pretrain.writing(tmp_path / "x"):
        open(tmp_path, "w")


def stop_after_three_steps(module):
    after_step = module.Run.after_step

    def stopping(self, *args):
        if self.step == 2:
            self.interrupt()
        return after_step(self, *args)

    module.Run.after_step = stopping


def count_checkpoints(module):
    """Says SAVED for each."""
    save = module.Run.save

    def counting(self, name="last.pth", **checkpoint):
        print("SAVED", name)
        save(self, name, **checkpoint)

    module.Run.save = counting


def test_in_ten_minutes_pretraining_saves_once_at_the_end_and_finetuning_at_each_evaluation(images, tmp_path):
    for name, arguments, checkpoints in (("pretrain", PRETRAIN, 1), ("finetune", FINETUNE, 3)):
        code, output = script(name, *arguments, "--epochs", 3, "--data", images, "--out", tmp_path / name,
                              before=count_checkpoints)
        assert code == 0 and output.count("SAVED last.pth") == checkpoints, output
        assert 1 <= output.count("SAVED best.pth") <= 3 if name == "finetune" else "best.pth" not in output
        assert weights(tmp_path / name / "last.pth", "run")["step"] == 2 * len(log(tmp_path / name))


@pytest.mark.parametrize("name, arguments", [("pretrain", PRETRAIN), ("finetune", [*FINETUNE, "--epochs", 2])])
def test_a_finished_run_says_that_nothing_is_left_to_train(images, alone, tmp_path, name, arguments):
    out = tmp_path / "out"
    shutil.copytree(alone(name, arguments), out)
    code, output = script(name, *arguments, "--data", images, "--out", out)
    assert code == 0 and "Nothing is left to train." in output and "Done" not in output, output
    assert ("what they predict in" in output) == (name == "pretrain")
    assert results(out) == results(alone(name, arguments)) and same_weights(out / "last.pth", alone(
        name, arguments) / "last.pth")


def stop_after_the_last_step(module):
    continue_or_stop = module.Run.continue_or_stop

    def stopping(self):
        self.interrupted = self.step == self.args.epochs * self.steps_per_epoch
        continue_or_stop(self)

    module.Run.continue_or_stop = stopping
    module.save_picture = lambda *_: None


def test_a_run_promises_no_picture_that_there_is_not(images, tmp_path):
    arguments = [*PRETRAIN, "--data", images, "--out", tmp_path]
    code, output = script("pretrain", *arguments, before=stop_after_the_last_step)
    assert code == 75, output
    code, output = script("pretrain", *arguments)
    assert code == 0 and f"Weights in {tmp_path}/last.pth.\n" in output, output


def test_a_checkpoint_that_does_not_know_a_flag_has_its_default(images, alone, tmp_path):
    checkpoint = torch.load(alone("pretrain", PRETRAIN) / "last.pth", weights_only=True)
    del checkpoint["args"]["clip_grad"]
    torch.save(checkpoint, tmp_path / "last.pth")
    arguments = [*PRETRAIN, "--data", images, "--out", tmp_path]
    code, output = script("pretrain", *arguments, "--clip_grad", 1)
    assert code == 2 and "was made with --clip_grad 3.0, this run has 1.0" in output, output
    code, output = script("pretrain", *arguments)
    assert code == 0, output


def test_pretraining_from_weights_begins_at_step_0_below_the_loss_from_scratch(images, alone, tmp_path):
    init = alone("pretrain", [*PRETRAIN, "--blr", 0.05]) / "last.pth"
    write_images(tmp_path / "others", 8, seed=7)
    arguments = [*PRETRAIN, "--data", tmp_path / "others", "--epochs", 1, "--warmup_epochs", 0, "--blr", 0]
    for name, more, sentence in (("scratch", [], "from scratch"), ("continued", ["--init", init], f"from {init}")):
        code, output = script("pretrain", *arguments, *more, "--out", tmp_path / name)
        assert code == 0 and sentence in output and "now at step 0" in output, output
    assert log(tmp_path / "continued")[0]["loss"] < 0.9 * log(tmp_path / "scratch")[0]["loss"]


def test_the_bar_tells_the_rate_of_the_last_hundred_steps_without_compilation_evaluation_and_saving(
        monkeypatch, tmp_path, one_process):
    now = [0.0]
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = small_run(tmp_path)
    run.args.compile = 1
    run.start()
    assert "compiling" in str(run.bar)

    def steps(n, seconds):
        for _ in range(n):
            now[0] += seconds
            assert run.after_step(torch.tensor(1.0), lr=0.1)
            if run.epoch_ended:
                now[0] += 1000  # evaluation
                run.log_epoch()
            if run.step % 70 == 0:
                now[0] += 500
                run.save()
            run.continue_or_stop()

    steps(1, 300)  # and compilation
    assert "compiling" not in str(run.bar) and "images/s" not in str(run.bar)
    steps(160, 0.5)
    assert " 8 images/s" in str(run.bar) and "epoch 5/10" in str(run.bar)
    steps(50, 2)
    assert " 3 images/s" in str(run.bar)  # 400 in 50 x 0.5 + 50 x 2 seconds
    steps(50, 2)
    assert " 2 images/s, 04:38 left" in str(run.bar)  # 139 steps
    assert [entry["images_per_second"] for entry in log(tmp_path)][1:] == [8, 8, 8, 2, 2]
    run.bar.close()


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


def nan_from_now_on(module):
    compute = module.ARM.forward
    module.ARM.forward = lambda self, images: compute(self, images) * math.nan


def test_a_step_whose_loss_is_not_finite_is_dropped_on_every_process_and_counted(images, tmp_path):
    arguments = [*PRETRAIN, "--data", images]
    for run in processes("pretrain", *arguments, "--out", tmp_path / "two", before=nan_at_steps_2_and_3):
        code, output = run.wait()
        assert code == 0, output
    code, output = script("pretrain", *arguments, "--out", tmp_path / "one", before=nan_at_steps_2_and_3)
    assert code == 0, output
    assert [entry["dropped_steps"] for entry in log(tmp_path / "two")] == [1, 1, 0, 0, 0, 0]
    assert all(math.isfinite(entry["loss"]) for entry in log(tmp_path / "two"))
    assert close(tmp_path / "one" / "last.pth", tmp_path / "two" / "last.pth")


def test_a_loss_that_stays_not_finite_stops_the_run_and_keeps_the_last_checkpoint(images, tmp_path):
    arguments = [*PRETRAIN, "--data", images, "--epochs", 20, "--out", tmp_path, "--checkpoint_minutes", 0]
    for before in (nan_from_step_3_on, nan_from_now_on):  # continued, it counts on from nine
        code, output = script("pretrain", *arguments, before=before)
        assert code == 1 and "not finite 10 steps in a row, up to step 12" in output, output
        assert "Traceback" not in output, output
    assert all(v.isfinite().all() for v in weights(tmp_path / "last.pth").values())


def test_a_corrupt_file_is_named_once_an_epoch_and_too_many_stop_the_run(tmp_path):
    write_images(tmp_path / "data", 120)
    (tmp_path / "data" / "07.png").write_bytes(b"\x89PNG, but no more")
    arguments = [*TINY, "--cluster_size", 2, "--data", tmp_path / "data", "--batch_size", 24, "--epochs", 2]
    for run in processes("pretrain", *arguments, "--out", tmp_path / "one"):
        code, output = run.wait()
        assert code == 0, output
    assert [entry["unreadable"] for entry in log(tmp_path / "one")] == [["07.png"], ["07.png"]]
    (tmp_path / "data" / "08.png").write_bytes(b"")
    code, output = script("pretrain", *arguments, "--out", tmp_path / "two")
    assert code == 1 and "2 of 120 images cannot be decoded, more than 1%, such as 07.png, 08.png" in output, output
    assert "Traceback" not in output, output


def test_a_corrupt_file_of_val_is_left_out_and_named_once_an_epoch(images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "val" / "dog" / "03.png").write_bytes(b"")
    for run in processes("finetune", *FINETUNE, "--epochs", 2, "--data", tmp_path / "data", "--out", tmp_path / "out"):
        code, output = run.wait()
        assert code == 0, output
    assert [(e["unreadable"], e["unreadable_val"]) for e in log(tmp_path / "out")] == 2 * [([], ["dog/03.png"])]
    code, output = script("finetune", *FINETUNE, "--data", tmp_path / "data", "--eval", tmp_path / "out" / "last.pth")
    assert code == 0 and "over 10 images" in output and output.count("Cannot decode dog/03.png") == 1, output


def test_a_folder_of_nothing_but_corrupt_files_stops_the_run_with_a_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(16):
        (tmp_path / "data" / f"{i}.jpg").write_bytes(b"not a photograph")
    code, output = script("pretrain", *PRETRAIN, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert code == 1 and "8 of 16 images cannot be decoded" in output and "Traceback" not in output, output


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    write_images(tmp_path / "data", 15)
    for name in (b"\xe9.png", b"\xe8.txt"):
        (tmp_path / "data" / os.fsdecode(name)).write_bytes(b"")
    code, output = script("pretrain", *PRETRAIN, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert code == 1 and "1 of 16 images cannot be decoded" in output and "Traceback" not in output, output
    assert "such as \\udce8.txt" in output and "such as \\udce9.png" in output, output


def kill_a_loader_worker():
    import multiprocessing
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(10)  # in which torch's handler of SIGCHLD raises, as it may anywhere


def kill_a_loader_worker_in_an_epoch(module):
    after_step = module.Run.after_step

    def killing(self, *args):
        if self.step == 2:
            kill_a_loader_worker()
        return after_step(self, *args)

    module.Run.after_step = killing


def kill_a_loader_worker_while_saving(module):
    torch.save = lambda *args: kill_a_loader_worker()


@pytest.mark.parametrize("before", [
    kill_a_loader_worker_in_an_epoch,
    kill_a_loader_worker_while_saving])
def test_a_dead_loader_worker_ends_the_run_with_a_sentence(images, tmp_path, before):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--epochs", 200, "--checkpoint_minutes", 0, "--out",
                          tmp_path, before=before)
    assert code == 1 and "data loader worker died" in output and "Traceback" not in output, output


def fault_at_step_2(module):
    """What no sentence is for: a fault of the program, or of the GPU."""
    def after_step(self, *args):
        raise RuntimeError("an illegal memory access")

    module.Run.after_step = after_step


def test_a_fault_ends_every_process_with_its_traceback_and_no_hang(images, tmp_path):
    for run in processes("finetune", *FINETUNE, "--data", images, "--out", tmp_path, before=fault_at_step_2):
        code, output = run.wait(60)
        assert code == 1 and "an illegal memory access" in output and "Traceback" in output, output


def fault_in_a_loader_worker(module):
    def transform(image, label):
        raise RuntimeError("a genuine fault")

    module.v2.Compose = lambda transforms: transform


def test_a_fault_in_a_loader_worker_is_told_as_it_is(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--out", tmp_path, before=fault_in_a_loader_worker)
    assert code == 1 and "a genuine fault" in output and "out of memory" not in output, output


OUT_OF_MEMORY = "out of memory, or a data loader worker died, often for want of it: use fewer --workers"


def want_memory(module):
    module.ARM.forward = lambda self, images: images.new_empty(10**15)


def test_want_of_memory_ends_the_run_with_a_sentence(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--out", tmp_path, before=want_memory)
    assert code == 1 and OUT_OF_MEMORY in output and "Traceback" not in output, output


def no_memory(module):
    module.main = lambda: bytearray(2**62)


def full_shm(module):
    """As torch tells it, from a loader worker."""
    def main():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
                           "last):\n...\nRuntimeError: unable to write to file </torch_7_1_0>: No space left on "
                           "device (28)")
    module.main = main


@pytest.mark.parametrize("before", [no_memory, full_shm])
def test_a_memory_error_and_a_full_dev_shm_are_told_as_want_of_memory(before):
    code, output = script("pretrain", before=before)
    assert code == 1 and OUT_OF_MEMORY in output and "Traceback" not in output, output


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
    arguments = [*PRETRAIN, "--epochs", 12, "--workers", 0, "--checkpoint_minutes", 0.01]
    run = torchrun("--standalone", "--nproc_per_node", 2, "--max-restarts", 2, "pretrain.py", *arguments, "--data",
                   images, "--out", tmp_path / "killed")
    while not (tmp_path / "killed" / "last.pth").exists():
        time.sleep(0.1)
        assert run.poll() is None, run.stdout.read()
    os.kill(next(worker_pids(tmp_path / "killed")), signal.SIGKILL)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert output.count("now at step") == 2, output
    assert close(alone("pretrain", arguments) / "last.pth", tmp_path / "killed" / "last.pth")


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds the worker to kill in /proc")
def test_two_nodes_train_together_and_go_on_after_a_worker_of_one_is_killed(images, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as the README says
    arguments = [*PRETRAIN, "--epochs", 12, "--workers", 0, "--checkpoint_minutes", 0.01]
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
    assert "".join(outputs).count("now at step") == 2, outputs
    assert close(alone("pretrain", arguments) / "last.pth", out / "last.pth")


def test_without_RANK_there_is_one_process_whatever_else_is_set_and_with_RANK_alone_a_sentence(images, tmp_path):
    left = environment(0, 2, 2, free_port())  # of a torchrun that has two
    without_rank = {name: left[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    arguments = [*PRETRAIN, "--data", images, "--epochs", 1, "--warmup_epochs", 0, "--out", tmp_path]
    code, output = Running("pretrain", *arguments, env=without_rank).wait(60)  # at once: nobody is waited for
    assert code == 0 and "1 x cpu" in output, output
    for absent in ("MASTER_ADDR", "WORLD_SIZE"):
        env = {name: value for name, value in left.items() if name != absent}
        code, output = Running("pretrain", *arguments, env=env).wait(60)
        assert code == 2 and output.count("RANK is set, but not all of") == 1 and "Traceback" not in output, output


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
    ("pretrain", ["--out", "/proc/nothing"], "cannot write to --out"),
    ("pretrain", ["--device", "cuda"], "--device cuda needs a GPU"),
    ("finetune", ["--data", "EMPTY"], "There is no folder"),
    ("finetune", ["--data", "MORE_VAL"], "has 1 classes that"),
    ("finetune", ["--init", "GOLDEN"], "does not fit this model"),
    ("finetune", ["--init", "TEXT"], "not a checkpoint, or is damaged"),
    ("finetune", ["--eval", "GOLDEN"], "has no classifier"),
    ("finetune", ["--eval", "PRETRAINED"], "has no classifier"),
    ("finetune", ["--init", "PRETRAINED", "--model", "arm_small"], "made with --model arm_tiny --image_size 48"),
    ("finetune", ["--smoothing", 2], "--smoothing is from 0 to 1"),
    ("finetune", ["--min_lr", 1], "--min_lr 1 is above the peak learning rate"),
    ("finetune", ["--image_size", 8], "one patch of 8x8 pixels is the whole image"),
    ("finetune", ["--data", "ONE_CLASS"], "has one class alone, cat: there is nothing to tell apart"),
    ("finetune", ["--predict", "GOLDEN"], "--predict needs --data")])
def test_bad_input_gives_one_sentence_and_exit_code_2(images, tmp_path, name, arguments, sentence):
    from arm import ARM, MODELS

    places = dict(EMPTY=tmp_path / "empty", IMAGES=images, MORE_VAL=tmp_path / "more", TEXT=tmp_path / "text.pth",
                  GOLDEN=ROOT / "tests" / "golden" / "official_pretrain.pth", PRETRAINED=tmp_path / "pretrained.pth",
                  ONE_CLASS=tmp_path / "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    if "ONE_CLASS" in arguments:
        write_images(tmp_path / "one" / "train" / "cat", 1)
        write_images(tmp_path / "one" / "val" / "cat", 1)
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


@pytest.mark.parametrize("arguments, sentence", [(["--data", "/nowhere"], "There is no folder /nowhere"),
                                                 (["--epochs", "many"], "invalid int value")])
def test_two_processes_say_what_is_wrong_once(tmp_path, arguments, sentence):
    ends = [run.wait() for run in processes("pretrain", *arguments, "--out", tmp_path)]
    assert [code for code, _ in ends] == [2, 2]
    assert sum(output.count(sentence) for _, output in ends) == 1, ends


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(images, tmp_path):
    first = SimpleNamespace(args=SimpleNamespace(out=str(tmp_path)))
    pretrain.Run.open_log(first)  # this process is the first run
    arguments = [*PRETRAIN, "--data", images, "--epochs", 1, "--warmup_epochs", 0, "--out", tmp_path]
    ends = [run.wait() for run in processes("pretrain", *arguments)]
    assert [code for code, _ in ends] == [2, 2], ends
    assert sum(output.count(f"another run writes to --out {tmp_path}") for _, output in ends) == 1, ends
    first.log.close()  # which gives up this process's lock
    code, output = script("pretrain", *arguments)
    assert code == 0, output


def test_other_classes_than_those_finetuned_on_are_refused_even_if_as_many(images, alone, tmp_path):
    shutil.copytree(images, tmp_path / "renamed")
    for part in ("train", "val"):
        (tmp_path / "renamed" / part / "cat").rename(tmp_path / "renamed" / part / "zebra")
    arguments = [*FINETUNE, "--epochs", 2, "--data", tmp_path / "renamed", "--out", tmp_path / "out"]
    checkpoint = alone("finetune", [*FINETUNE, "--epochs", 2]) / "last.pth"
    for flag, sentence in (("--eval", "the folder zebra is none of the 2 classes of the checkpoint"),
                           ("--resume", "cat is only among one of them")):
        code, output = script("finetune", *arguments, flag, checkpoint)
        assert code == 2 and sentence in output and "Traceback" not in output, output


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
    assert code == 2 and "is a checkpoint of another model" in output and "Traceback" not in output, output
    assert (tmp_path / "last.pth").read_bytes() == before


def another_order(module):
    """A fork in which one line is another: that of the order of clusters, or of scanning."""
    name, tokens = ("ARM", "order") if hasattr(module, "ARM") else ("ARMClassifier", "orders")

    class Fork(getattr(module, name)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, tokens, getattr(self, tokens).flip(0))

    setattr(module, name, Fork)


@pytest.mark.parametrize("name, arguments", [("pretrain", PRETRAIN), ("finetune", [*FINETUNE, "--epochs", 2])])
def test_a_fork_with_another_order_of_the_tokens_is_refused_in_the_same_folder(images, alone, tmp_path, name,
                                                                             arguments):
    shutil.copy(alone(name, arguments) / "last.pth", tmp_path)
    code, output = script(name, *arguments, "--data", images, "--out", tmp_path, before=another_order)
    assert code == 2 and "was trained with another order of the tokens" in output, output
    assert "Traceback" not in output and same_weights(tmp_path / "last.pth", alone(name, arguments) / "last.pth")


# What comes out: the picture, the next command, predictions, evaluations


def test_the_picture_has_three_rows_and_the_first_cluster_is_as_it_is_in_each(tmp_path):
    torch.manual_seed(0)
    model = pretrain.ARM(48, 8, 2, dim=16, depth=2, decoder_dim=64, decoder_depth=1)
    drawings = pretrain.Images(pretrain.Drawings(16, 48, seed=0), lambda *pair: pair)
    pretrain.save_picture(str(tmp_path / "picture.png"), model, drawings, torch.device("cpu"))
    pixels = pretrain.read_image(str(tmp_path / "picture.png")).int()
    assert pixels.shape == (3, 2 + 3 * 98, 2 + 8 * 98)  # each image is 96 pixels wide, and 2 apart
    rows = pixels[:, 2:, 2:].unflatten(2, (8, 98)).unflatten(1, (3, 98))[:, :, :96, :, :96]  # (3, rows, y, 8, x)
    rows = rows.movedim(1, 0)  # (rows, 3, y, 8, x)
    images, given, predicted = rows
    first = (slice(None), slice(32), slice(None), slice(32))  # 2 x 2 patches of 8 pixels, twice as large
    assert (images[first][:, ::2, 0, ::2] - drawings[0, 0][0][:, :16, :16]).abs().max() <= 1
    assert torch.equal(given[first], images[first]) and torch.equal(predicted[first], images[first])
    assert (rows[:, :, :32, :, 32:34] == 255).all() and (rows[:, :, 32:34, :, :32] == 255).all()  # the frame
    last = given[:, 80:, :, 80:]  # a patch
    assert (last == last[:, :1, :, :1]).all() and not (predicted[:, 80:, :, 80:] == last).all()
    mean, std = (t.view(3, 1) for t in pretrain.mean_and_std(torch.device("cpu")))
    its_mean = ((images[:, 80:, :, 80:].float().mean(dim=(1, 3)) / 255 - mean) / std).mean(dim=0)  # of all channels
    assert (last[:, 0, :, 0] - 255 * (its_mean * std + mean).clamp(0, 1)).abs().max() <= 1


@pytest.mark.parametrize("count, val, argv, small", [
    (49_999, True, [], True),
    (50_000, True, [], False),
    (500, False, ["--model", "arm_small", "--image_size", "64", "--patch_size", "8"], True)])
def test_the_command_to_finetune_has_the_recipe_for_small_data_below_50000_images(monkeypatch, tmp_path, count, val,
                                                                                 argv, small):
    if val:
        (tmp_path / "val").mkdir()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", str(tmp_path), *argv])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # without RANK it is left of another's torchrun
    args = pretrain.get_args()
    launcher, command = pretrain.finetune_command(args, count).split(" finetune.py ")
    assert launcher == "python"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *shlex.split(command)])
    chosen = vars(finetune.get_args())
    assert chosen["init"] == "runs/pretrain/last.pth"
    assert chosen["data"] == (str(tmp_path) if val else "DIR_OF_train_AND_val")
    sizes = dict(model=args.model, image_size=args.image_size if argv else 224, patch_size=args.patch_size)
    assert {name: chosen[name] for name in sizes} == sizes
    recipe = dict(batch_size=32, blr=8e-3, epochs=50, layer_decay=0.85, drop_path=0, mixup=0, cutmix=0, augment=0,
                  erasing=0, crop_scale=0.5, ema_decay=0.99)
    assert {name: chosen[name] == value for name, value in recipe.items()} == dict.fromkeys(recipe, small)


COLOURS = dict(black=(20, 20, 20), blue=(30, 60, 230), green=(20, 200, 40), red=(230, 30, 20), white=(240, 240, 240),
               yellow=(230, 220, 20))


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """A folder of images of six colours, and the checkpoint of a model that has learned to tell them apart."""
    root = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        for part, n in (("train", 8), ("val", 2)):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (20, 20), tuple(min(255, v + i) for v in colour)).save(root / part / name / f"{i}.png")
    plain = [value for name in ("mixup", "cutmix", "augment", "erasing", "drop_path", "ema_decay", "smoothing")
             for value in (f"--{name}", 0)]
    code, output = script("finetune", *TINY, *plain, "--patch_size", 8, "--epochs", 5, "--blr", 0.05, "--workers", 0,
                          "--data", root, "--out", root / "run")
    assert code == 0 and log(root / "run")[-1]["top1"] == 100, output
    return root, root / "run" / "best.pth"


def test_predictions_are_five_classes_by_name_for_each_image_of_a_folder_and_on_the_screen_for_one(colours, tmp_path):
    data, checkpoint = colours
    (tmp_path / "loose").mkdir()
    for name in COLOURS:
        shutil.copy(data / "val" / name / "0.png", tmp_path / "loose" / f"{name}.png")
    (tmp_path / "loose" / "damaged.png").write_bytes(b"")
    arguments = ["--predict", checkpoint, "--device", "cpu", "--workers", 0]
    code, output = script("finetune", *arguments, "--data", tmp_path / "loose", "--out", tmp_path / "one")
    assert code == 0 and "7 images" in output, output
    with open(tmp_path / "one" / "predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", *(f"{what}_{k}" for k in range(1, 6) for what in ("class", "probability"))]
    assert [row[0] for row in rows] == sorted(f"{name}.png" for name in (*COLOURS, "damaged"))
    assert rows.pop(2) == ["damaged.png", "cannot be decoded"]
    for image, *found in rows:
        names, shares = found[::2], [float(share) for share in found[1::2]]
        assert f"{names[0]}.png" == image and len({*names} & {*COLOURS}) == 5
        assert shares == sorted(shares, reverse=True) and 0.5 < sum(shares) < 1.0005
    for run in processes("finetune", *arguments, "--data", tmp_path / "loose", "--out", tmp_path / "two"):
        code, output = run.wait()
        assert code == 0, output
    one, two = ((tmp_path / name / "predictions.csv").read_text() for name in ("one", "two"))
    assert one == two
    code, output = script("finetune", *arguments, "--data", tmp_path / "loose" / "red.png", "--out", tmp_path / "none")
    assert code == 0 and output.splitlines()[-1].startswith("red ") and output.splitlines()[-1].count("%") == 5, output
    assert not (tmp_path / "none").exists()
    code, output = script("finetune", *arguments, "--data", tmp_path / "loose", "--out", "/proc/nothing")
    assert code == 2 and "cannot write to --out /proc/nothing" in output and "Traceback" not in output, output


def evaluated(checkpoint, data, *arguments):
    return script("finetune", "--eval", checkpoint, "--data", data, "--device", "cpu", "--workers", 0, *arguments)


def test_a_batch_size_that_processes_do_not_divide_is_refused_for_training_alone(monkeypatch):
    monkeypatch.setattr(pretrain, "process", lambda: (0, 3))
    monkeypatch.setattr("sys.argv", ["finetune.py", "--data", "x", "--eval", "best.pth"])
    args = finetune.get_args()
    assert args.batch_size == 1024
    with pytest.raises(BadInput, match="--batch_size 1024 does not divide into 3 processes x 1 --accum_steps"):
        monkeypatch.setattr("sys.argv", ["finetune.py", "--data", "x"])
        finetune.get_args()


def test_evaluation_of_some_classes_takes_predictions_from_them(colours, tmp_path):
    data, checkpoint = colours
    for name in ("red", "yellow"):
        shutil.copytree(data / "val" / name, tmp_path / name)
    code, output = evaluated(checkpoint, tmp_path)
    assert code == 0 and "Model: top-1 100.00%, loss" in output, output
    assert "over 4 images, of 2 of 6 classes, from which predictions are taken" in output, output
    (tmp_path / "red").rename(tmp_path / "blue")  # so that every red image is wrong
    code, output = evaluated(checkpoint, tmp_path)
    assert code == 0 and "Model: top-1 50.00%" in output, output


def test_evaluation_of_a_checkpoint_without_names_takes_numbered_folders_or_names_given(colours, tmp_path):
    data, checkpoint = colours
    torch.save(weights(checkpoint), tmp_path / "bare.pth")
    sizes = ["--image_size", 16, "--patch_size", 8, "--model", "arm_tiny"]
    for i, name in enumerate(COLOURS):
        if i in (1, 3, 5):
            shutil.copytree(data / "val" / name, tmp_path / "numbered" / str(i))
    code, output = evaluated(tmp_path / "bare.pth", tmp_path / "numbered", *sizes)
    assert code == 0 and "Model: top-1 100.00%" in output and "of 3 of 6 classes" in output, output
    code, output = evaluated(tmp_path / "bare.pth", data, *sizes)  # as many folders as classes, in order
    assert code == 0 and "Model: top-1 100.00%, top-5 100.00%" in output, output
    shutil.copytree(data / "val" / "red", tmp_path / "named" / "red")
    code, output = evaluated(tmp_path / "bare.pth", tmp_path / "named", *sizes)
    assert code == 2 and "give the names of its classes in their order by --classes" in output, output
    code, output = evaluated(tmp_path / "bare.pth", tmp_path / "named", *sizes, "--classes", data / "train")
    assert code == 0 and "Model: top-1 100.00%" in output and "of 1 of 6 classes" in output, output
