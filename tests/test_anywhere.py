"""Wherever people run it: schedulers, containers, notebooks, other systems, network disks, broken downloads."""

import errno
import http.server
import importlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, at_step, environment, free_port, script, weights, write_images
from PIL import Image
from soak import FINETUNE, PRETRAIN

import arm
import finetune
import pretrain
from arm import BadInput, read_checkpoint
from pretrain import HOST, ImageFiles, Samples, list_images


# Signals


class Send:
    """A hook: at step 3 the process and its loader workers get a signal, as all processes of a SLURM step do."""

    def __init__(self, number, times=1, ignored=False):
        self.number, self.times, self.ignored = number, times, ignored

    def __call__(self, module):
        signal.signal(self.number, signal.SIG_IGN if self.ignored else signal.SIG_DFL)  # whatever started the tests
        at_step(3, self.send)

    def send(self):
        for _ in range(self.times):
            for child in multiprocessing.active_children():
                os.kill(child.pid, self.number)
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_to_a_run_and_its_loader_workers_is_told_saves_within_a_step_and_exits_75(images, tmp_path, name):
    code, output = script("pretrain", *PRETRAIN, "--workers", 1, "--data", images, "--out", tmp_path,
                          before=Send(getattr(signal, name)))
    assert code == 75 and f"{name}: the run is saved" in output and "Interrupted at step 3" in output, output
    assert weights(tmp_path / "last.pth", "step") == 3 and "Traceback" not in output


def test_the_same_signal_twice_in_a_moment_is_one_signal(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--data", images, "--out", tmp_path, before=Send(signal.SIGINT, 2))
    assert code == 75 and output.count("SIGINT: the run is saved") == 1 and "Interrupted at step 3" in output, output


def test_the_limit_of_cpu_time_which_is_told_each_second_is_one_signal(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    caught = pretrain.catch_signals()
    for name, again in (("SIGXCPU", True), ("SIGTERM", False)):
        caught.clear()
        number = getattr(signal, name)
        handlers[number](number, None)
        caught[0] -= 3  # seconds
        if again:
            handlers[number](number, None)
        else:
            with pytest.raises(SystemExit):
                handlers[number](number, None)


def test_under_nohup_the_end_of_the_terminal_ends_nothing(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--epochs", 3, "--data", images, "--out", tmp_path,
                          before=Send(signal.SIGHUP, ignored=True))
    assert code == 0 and "Done." in output, output


def signalled_twice_while_evaluating(module):
    def evaluate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.1)  # of an evaluation that may take hours
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)

    module.TASKS["classify"].evaluate = evaluate


def test_a_second_signal_ends_a_long_evaluation_at_once(images, tmp_path):
    started = time.monotonic()
    code, output = script("finetune", *FINETUNE, "--data", images, "--out", tmp_path,
                          before=signalled_twice_while_evaluating)
    told = "a second signal, two seconds later or more, ends it at once"
    assert code == 75 and told in output and "Traceback" not in output, output
    assert time.monotonic() - started < 60 and weights(tmp_path / "last.pth", "step") == 1


def lose_the_parent(module):
    module.PARENT = os.getppid()
    at_step(3, lambda: setattr(module, "PARENT", -1))


def test_a_run_whose_torchrun_was_killed_saves_and_ends_and_one_whose_shell_has_gone_goes_on(images, tmp_path):
    arguments = [*PRETRAIN, "--epochs", 3, "--data", images]
    code, output = script("pretrain", *arguments, "--out", tmp_path / "a", before=lose_the_parent,
                          env=dict(TORCHELASTIC_RUN_ID="1"))
    assert code == 75 and weights(tmp_path / "a" / "last.pth", "step") == 3, output
    code, output = script("pretrain", *arguments, "--out", tmp_path / "b", before=lose_the_parent)
    assert code == 0, output


def killed_with_workers(module):
    def die():
        print("WORKERS", *[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    at_step(2, die)


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")
def test_loader_workers_end_soon_after_a_run_is_killed(images, tmp_path):
    code, output = script("pretrain", *PRETRAIN, "--workers", 2, "--data", images, "--out", tmp_path,
                          before=killed_with_workers)
    pids = output.partition("WORKERS ")[2].split("\n")[0].split()
    assert code == -signal.SIGKILL and len(pids) == 2, output
    end = time.monotonic() + 15  # they look every five seconds
    while any(map(lives, pids)):
        assert time.monotonic() < end, pids
        time.sleep(0.2)


@pytest.mark.parametrize("end", ["", "raise ValueError", "signal.signal(signal.SIGTERM, print); raise ValueError"])
def test_a_program_that_uses_the_loader_ends_whatever_is_left_of_it(end):
    lines = ["import signal, torch", "from pretrain import Drawings, Samples, load",
             "data = Samples(Drawings(64, 32, seed=0), lambda image, label: (image, label))",
             "batches = load(data, [[(0, i)] for i in range(64)], 2, torch.device('cpu'))", "next(batches)", end]
    command = [sys.executable, "-c", "\n".join(lines)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert run.stderr.splitlines()[-1:] == (["ValueError"] if "raise" in end else []), run.stderr


# Launchers


@pytest.mark.parametrize("env, told", [
    (dict(SLURM_STEP_NUM_TASKS="2"), "srun started 2 tasks, none of which knows its RANK"),
    (dict(OMPI_COMM_WORLD_SIZE="3"), "mpirun started 3 tasks, none of which knows its RANK"),
    (dict(environment(0, 2, 2), RANK="x"), "invalid literal for int() with base 10: 'x'"),
    (dict(environment(2, 2, 2)), "RANK is not below WORLD_SIZE"),
    (dict(environment(-1, 2, 2)), "RANK is not below WORLD_SIZE"),
    (dict(environment(0, 2, 2), LOCAL_RANK="first"), "'first'"),
    (dict(environment(0, 1, 1), MASTER_PORT="port"), "'port'"),
    (dict(RANK="0"), "'WORLD_SIZE'"),
    (dict(RANK="0", WORLD_SIZE="1"), "MASTER_ADDR expected")])
def test_a_launch_that_is_half_told_or_wrong_is_refused_in_a_sentence_that_names_torchrun(tmp_path, env, told):
    code, output = script("pretrain", "--drawings", 64, "--out", tmp_path, env=env)
    assert code == 2 and told in output and "torchrun" in output and output.count("\n") == 1, output


def fails_to_join(module):
    def init_process_group(*_, **__):
        raise RuntimeError("Unable to find address for: lo9")  # as gloo does
    module.dist.init_process_group = init_process_group


def test_an_error_in_joining_is_told_in_a_sentence(tmp_path):
    code, output = script("pretrain", "--drawings", 64, "--out", tmp_path, before=fails_to_join)
    assert code == 2 and "cannot join the other processes: Unable to find address" in output, output
    assert "Traceback" not in output


def test_a_port_in_use_is_told_in_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        env = environment(0, 2, 2, taken.getsockname()[1])
        code, output = script("pretrain", "--drawings", 64, "--out", tmp_path, env=env)
    assert code == 2 and "address already in use" in output and "Traceback" not in output, output


@pytest.mark.parametrize("gpus, env, device", [
    (1, dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3"), "cuda:0"),  # srun shows each task its own
    (1, dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", LOCAL_WORLD_SIZE="4"), "cuda:0"),
    (4, dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3", LOCAL_WORLD_SIZE="4", TORCHELASTIC_RUN_ID="1"), "cuda:3"),
    (1, dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="1"), None),
    (0, {}, None),
    (2, {}, "cuda:0")])
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_one_that_it_sees(monkeypatch, gpus, env, device):
    for name in environment(0, 1, 1):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # for it to be as it was
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(pretrain, "fused_mixer", lambda device: None)
    if device:
        assert str(pretrain.start_processes(SimpleNamespace(device="cuda"))) == device
    else:
        with pytest.raises(BadInput, match="--device cuda needs a GPU for each"):
            pretrain.start_processes(SimpleNamespace(device="cuda"))


@pytest.mark.parametrize("cores, expected", [({1, 5, 6}, 3), ({2}, 1), (set(range(64)), 16)])
def test_loader_workers_are_by_default_as_many_as_cores_that_may_be_used(monkeypatch, cores, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "d"])
    assert pretrain.get_args().workers == expected


def temporary_folder_of_a_long_name(module):
    module.tempfile.tempdir = os.environ["LONG"]


def test_a_tmpdir_too_long_for_sockets_is_told_at_once(images, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    arguments = [*PRETRAIN, "--epochs", 1, "--warmup_epochs", 0, "--data", images, "--out", tmp_path / "out"]
    for workers, expected in ((1, 2), (0, 0)):
        code, output = script("pretrain", *arguments, "--workers", workers, env=dict(LONG=str(long)),
                              before=temporary_folder_of_a_long_name)
        assert code == expected and ("TMPDIR" in output) == (code == 2) and "Traceback" not in output, output


def test_apples_gpus_are_refused_in_a_sentence(tmp_path):
    code, output = script("pretrain", "--device", "mps", "--out", tmp_path)
    assert code == 2 and "argument --device: invalid choice: 'mps'" in output and "Traceback" not in output, output


def as_on_windows(module):
    """What the standard library lacks there is taken away, and the scripts are imported anew."""
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGKILL", "pthread_sigmask"):
        delattr(signal, name)
    for name in ("EX_TEMPFAIL", "sched_getaffinity", "fork", "getuid", "statvfs"):
        delattr(os, name)
    for name in ("triton", "fcntl", "resource", "pwd"):
        sys.modules[name] = None
    for one in (arm, pretrain, finetune):
        importlib.reload(one)


def signalled_as_on_windows(module):
    as_on_windows(module)
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))


def test_what_windows_lacks_is_needed_by_neither_script(tmp_path):
    code, output = script("pretrain", "--drawings", 64, "--epochs", 9, "--out", tmp_path,
                          before=signalled_as_on_windows)  # so that it is saved and ends, too
    assert code == 75 and "Interrupted at step 2" in output, output


# Files


@pytest.mark.parametrize("module, argv", [
    (pretrain, ["--data", "~/d", "--out=~/run", "--init", "~/a.pth"]),
    (finetune, ["--data=~/d", "--out", "~/run", "--init", "~/a.pth"]),
    (finetune, ["--data", "~/d", "--eval", "~/a.pth", "--classes", "~/c.txt", "--real_labels", "~/r.json"]),
    (finetune, ["--data", "~", "--predict", "~/a.pth"])])
def test_a_tilde_is_the_home_in_every_flag(monkeypatch, tmp_path, module, argv):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    monkeypatch.setattr(module, "read_checkpoint", lambda path: {})
    args = module.get_args()
    args = vars(args if module is pretrain else args[0])
    for flag, value in zip(*[iter([part for argument in argv for part in argument.split("=")])] * 2):
        assert args[flag[2:]] == value.replace("~", str(tmp_path))


def test_a_tilde_is_the_home_for_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(dict(step=3), tmp_path / "a.pth")
    assert read_checkpoint("~/a.pth") == dict(step=3)


@pytest.mark.parametrize("link, to", [("dog", "/mnt/not_mounted/dog"), ("n01.v2", "/nowhere"),
                                      ("cat/09.png", "/nowhere"), ("dog", "dog")])
def test_a_link_that_leads_nowhere_is_told_with_the_machine_and_no_class_goes_missing(tmp_path, link, to):
    write_images(tmp_path / "cat", 2)
    (tmp_path / link).symlink_to(to)
    with pytest.raises(BadInput, match=f"{link}.*{HOST}"):
        list_images(str(tmp_path))


def test_a_folder_that_is_not_there_is_told_with_the_machine(tmp_path):
    with pytest.raises(BadInput, match=f"There is no folder {tmp_path}/d on {HOST}"):
        list_images(f"{tmp_path}/d")


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tgz", "images.zip", "part.parquet"])
@pytest.mark.parametrize("inside", [False, True])
def test_archives_are_refused_by_a_sentence_that_names_them_and_how_to_unpack_them(tmp_path, name, inside):
    (tmp_path / name).write_bytes(b"packed")
    with pytest.raises(BadInput) as refused:
        list_images(str(tmp_path) if inside else f"{tmp_path}/{name}/train")  # as finetuning would
    assert name in str(refused.value) and "tar -xf" in str(refused.value) and "unzip" in str(refused.value)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_the_system_cannot_read_is_told_with_the_machine_and_not_replaced(tmp_path, monkeypatch, code,
                                                                                     replace):
    write_images(tmp_path, 3)

    def refusing(path):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(pretrain, "read_image", refusing)
    with pytest.raises(BadInput, match=f"cannot read 01.png on {HOST}: .*{os.strerror(code)}"):
        Samples(ImageFiles(str(tmp_path), list_images(tmp_path)), None, replace=replace)[0, 1]


def test_why_an_image_cannot_be_decoded_is_told(tmp_path, capsys):
    write_images(tmp_path, 3)
    (tmp_path / "01.png").write_bytes((tmp_path / "01.png").read_bytes()[:60])
    Image.new("I", (4, 4), -7).save(tmp_path / "02.tif")
    dataset = Samples(ImageFiles(str(tmp_path), list_images(tmp_path)), lambda image, label: image, replace=False)
    for index in (1, 3):
        dataset[0, index]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("Cannot decode 01.png: it is left out (") and "truncated" in told[0]
    reason = "ValueError('its values, -7 to -7, are not from 0 to 65535')"
    assert told[1] == f"Cannot decode 02.tif: it is left out ({reason})"


def lose_images(module):
    """Once they are listed they are gone."""
    listed = module.list_images

    def list_and_remove(folder):
        names = listed(folder)
        for name in names:
            os.rename(os.path.join(folder, name), os.path.join(folder, f"{name}.gone"))
        return names

    module.list_images = list_and_remove


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_worker_tells_what_the_user_can_mend_in_one_sentence_whichever_process_it_is_of(tmp_path, workers):
    write_images(tmp_path / "data", 16)
    code, output = script("pretrain", *PRETRAIN, "--data", tmp_path / "data", "--workers", workers, "--out",
                          tmp_path / "out", before=lose_images,
                          env=dict(environment(0, 1, 1, free_port()), LOCAL_RANK="1"))
    told = [line for line in output.replace("\r", "\n").splitlines() if "No such file or directory" in line]
    assert code == 2 and len(told) == 1 and told[0].startswith("cannot read ") and HOST in told[0], output
    assert "Traceback" not in output and "Cannot decode" not in output, output


def rename_refused(module):
    def replace(old, new):
        if new.endswith("last.pth"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), old, None, new)
        os.rename(old, new)

    module.os = SimpleNamespace(**{**vars(os), "replace": replace})


def test_a_rename_that_is_refused_is_told_with_both_names_and_keeps_the_old_and_the_new_file(images, tmp_path):
    out, arguments = tmp_path / "out", [*PRETRAIN, "--data", images, "--out", tmp_path / "out"]
    code, output = script("pretrain", *arguments, before=Send(signal.SIGTERM))
    assert code == 75, output
    old = (out / "last.pth").read_bytes()
    code, output = script("pretrain", *arguments, before=rename_refused)
    sentence = re.search(f"cannot write {out}/last.pth: .*: '{out}/last.pth.new' -> '{out}/last.pth'", output)
    assert code == 1 and sentence and "Traceback" not in output, output
    assert (out / "last.pth").read_bytes() == old and weights(out / "last.pth.new", "step") > 3


@pytest.mark.parametrize("number, code", [(errno.EINVAL, 0), (errno.ENOTSUP, 0), (errno.EIO, 1)])
def test_a_disk_that_knows_no_fsync_will_do_and_one_that_fails_will_not(tmp_path, number, code):
    with mock.patch("os.fsync", side_effect=OSError(number, os.strerror(number))):
        if code:
            with pytest.raises(SystemExit, match="cannot write .*a.json: .*Input/output error"):
                pretrain.write_whole(str(tmp_path / "a.json"), lambda file: file.write(b"new"))
        else:
            pretrain.write_whole(str(tmp_path / "a.json"), lambda file: file.write(b"new"))
    assert (tmp_path / "a.json").exists() == (code == 0)


def test_what_is_told_of_a_failed_write_is_its_cause_and_what_is_no_failed_write_is_raised(tmp_path):
    def by_pil(file):
        try:
            raise AttributeError("no fileno")
        except AttributeError:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    with pytest.raises(SystemExit, match="cannot write .*a.png: .*File too large"):
        pretrain.write_whole(str(tmp_path / "a.png"), by_pil)
    with pytest.raises(RuntimeError, match="CUDA error"):
        pretrain.write_whole(str(tmp_path / "last.pth"), lambda file: exec("raise RuntimeError('CUDA error')"))


def test_a_run_inside_the_folder_of_images_adds_none_to_them(tmp_path):
    write_images(tmp_path / "photos", 16)
    arguments = [*PRETRAIN, "--data", tmp_path / "photos", "--out", tmp_path / "photos" / "runs" / "pretrain"]
    for end in ("Done.", "Nothing is left to train."):
        code, output = script("pretrain", *arguments, "--epochs", 2)
        assert code == 0 and end in output, output
    assert (tmp_path / "photos" / "runs" / "pretrain" / "predictions.png").exists()
    for name in ("last.pth", "predictions.png", "train/last.pth"):  # a photograph may be called so
        (tmp_path / "alike" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "alike" / name).touch()
    (tmp_path / "alike" / "train" / "a.png").touch()
    assert list_images(tmp_path / "alike") == ["train/a.png"]


# Downloads


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A server of one file, whose content is site.content; torch's cache is a folder of its own."""
    site = SimpleNamespace(content=b"", pause=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(site.content)))
            self.end_headers()
            time.sleep(site.pause)
            self.wfile.write(site.content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}/a.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    yield site
    server.shutdown()


def test_a_download_that_is_broken_or_no_checkpoint_is_not_kept(site, tmp_path):
    torch.save(dict(step=3), tmp_path / "a.pth")
    good = (tmp_path / "a.pth").read_bytes()
    for site.content in (good[: len(good) // 2], b"<html>please log in</html>", b""):
        with pytest.raises(BadInput, match="the download is removed, and the next run tries again"):
            read_checkpoint(site.url)
        assert os.listdir(tmp_path / "home" / "hub" / "checkpoints") == []
    site.content = good
    assert read_checkpoint(site.url) == dict(step=3)
    site.content = b"gone"
    assert read_checkpoint(site.url) == dict(step=3)  # a good one is kept


def test_a_download_that_fails_or_cannot_be_removed_is_told_in_a_sentence(site, monkeypatch):
    for url in ("http://127.0.0.1:1/a.pth", "http://127.0.0.1:x/a.pth", f"{site.url}/\xe4.pth", f"{site.url}\udce4"):
        with pytest.raises(BadInput, match="cannot download http://.*TORCH_HOME names another place"):
            read_checkpoint(url)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    site.content = b"no checkpoint"
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(BadInput, match="is damaged: it cannot be read; remove its download, .*/arm-"):
        read_checkpoint(site.url)


def test_a_server_that_sends_nothing_for_a_minute_is_given_up(site, monkeypatch):
    site.content, site.pause = b"late", 3
    limits, limit = [], socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: limits.append(seconds) or limit(
        seconds and seconds / 100))
    with pytest.raises(BadInput, match="cannot download http://.*: timed out"):
        read_checkpoint(site.url)
    assert limits == [60, None]


def test_a_cache_that_cannot_be_written_is_told_by_the_name_of_its_variable(site, tmp_path):
    (tmp_path / "home").write_text("a file, in which no folder can be made")
    with pytest.raises(BadInput, match="TORCH_HOME"):
        read_checkpoint(site.url)


# Streams


def without_streams(module):
    sys.stdout = sys.stderr = None


def with_streams_that_are_full(module):
    for descriptor in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def with_readers_that_have_gone(module):
    read, write = os.pipe()
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)
    os.close(read)


def in_a_notebook(module):
    """With what ipykernel's stream has of a file."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, SimpleNamespace(write=stream.write, flush=stream.flush, isatty=lambda: False,
                                           encoding="UTF-8"))


@pytest.mark.parametrize("before", [without_streams, with_streams_that_are_full, with_readers_that_have_gone,
                                    in_a_notebook])
def test_a_run_goes_on_whatever_becomes_of_its_streams(images, tmp_path, before):
    code, output = script("pretrain", *PRETRAIN, "--epochs", 2, "--data", images, "--out", tmp_path, before=before)
    assert code == 0 and weights(tmp_path / "last.pth", "step") == 4, output


def test_a_notebook_shows_predictions(images, tmp_path):
    model = arm.ARMClassifier(16, 4, **arm.MODELS["arm_tiny"], num_classes=2)
    args = dict(task="classify", model="arm_tiny", image_size=16, patch_size=4, pool="mean", directions=4)
    torch.save(dict(model=model.state_dict(), classes=["cat", "dog"], args=args), tmp_path / "a.pth")
    code, output = script("finetune", "--predict", tmp_path / "a.pth", "--data", images / "val", "--workers", 0,
                          before=in_a_notebook)
    assert code == 0 and len(re.findall(r"^(?:cat|dog)/\d+.png\t(?:cat|dog) 0", output, re.M)) == 11, output


def test_in_an_interactive_session_bad_input_ends_the_run_and_not_the_session(monkeypatch, capsys):
    def exit_at_once(code):
        raise AssertionError("the session is gone")

    monkeypatch.setattr(os, "_exit", exit_at_once)
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    streams = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as end:
        pretrain.run(lambda: arm.check(False, "it is bad"))
    assert end.value.code == 2 and capsys.readouterr().err == "it is bad.\n" and (sys.stdout, sys.stderr) == streams
