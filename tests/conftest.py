"""What the tests share: golden values, small image folders, and a way to run the scripts as users do, but faster."""

import atexit
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are small, and threads that wait for each other slow on a busy machine

# Scripts are run in children of a server that has already imported torch: each starts in a moment.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRITON_INTERPRET"] = "1"  # the kernels for GPUs run on CPU tensors
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["pretrain", "finetune", "torch._dynamo"])


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding:DeprecationWarning")


def child(script, argv, env, output, before):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # loader workers start as they do for users, not from a server
    sys.argv = [f"{script}.py", *map(str, argv)]
    module = __import__(script)
    if before:
        before(module)
    module.end_with_a_sentence(module.main)


class Running:
    """A script that runs in a process of its own. before: called with the script's module first, in that process."""

    def __init__(self, script, *argv, env=None, before=None):
        handle, self.path = tempfile.mkstemp()
        os.close(handle)
        self.process = server.Process(target=child, args=(script, argv, env or {}, self.path, before))
        self.process.start()
        atexit.register(self.process.kill)  # a test that fails may leave it running
        self.pid = self.process.pid

    def wait(self, timeout=300):
        """Returns (exit code, what it printed)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running after {timeout} s: {self.output()}")
        return self.process.exitcode, self.output()

    def output(self):
        return Path(self.path).read_text()


def script(name, *argv, env=None, before=None):
    """Run a script to its end. Returns (exit code, what it printed)."""
    return Running(name, *argv, env=env, before=before).wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank, n, local, port=29500):
    """torchrun's, of one of n processes, `local` of them on each machine."""
    return dict(RANK=str(rank), LOCAL_RANK=str(rank % local), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(local),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def processes(name, *argv, n=2, before=None):
    """Start a script in n processes that know of each other, as torchrun would."""
    port = free_port()
    return [Running(name, *argv, before=before, env=environment(r, n, n, port)) for r in range(n)]


def golden_images(size):
    """The formula of the golden values' input: two images, (2, 3, size, size)."""
    b, c, i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 3, size, size)), indexing="ij")
    x = torch.sin(0.05 * i * (c + 1) + 0.03 * j * (b + 1)) + 0.5 * torch.cos(0.11 * j - 0.07 * i * (b + 1) + c)
    return x.float()


def weights(path, part="model"):
    return torch.load(path, weights_only=True)[part]


def same_weights(a, b, part="model"):
    """Whether two checkpoints hold the same weights, bit for bit."""
    a, b = weights(a, part), weights(b, part)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write_images(folder, n, seed=0, size=20):
    from torchvision.transforms.v2.functional import to_pil_image  # not before TRITON_INTERPRET is set: it loads Triton

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        pixels = torch.randint(256, (3, size, size + 3), generator=generator).byte()
        to_pil_image(pixels).save(folder / f"{i:02}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An image folder: train/ with 2 x 8 images, val/ with 5 and 6, an odd number that two processes cannot halve."""
    root = tmp_path_factory.mktemp("images")
    for c, name in enumerate(("cat", "dog")):
        write_images(root / "train" / name, 8, seed=c)
        write_images(root / "val" / name, 5 + c, seed=10 + c)
    return root


@pytest.fixture(scope="session")
def alone(images, tmp_path_factory):
    """alone(script, arguments): the folder of such a run on `images`, left alone; tests share it, and only read it."""
    folders = {}

    def run_once(name, arguments):
        key = (name, *map(str, arguments))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("alone")
            code, output = script(name, *arguments, "--data", images, "--out", folders[key])
            assert code == 0, output
        return folders[key]

    return run_once
