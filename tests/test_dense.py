"""Detection and segmentation: the heads, the numbers, the data and the runs, on narrow models."""

import json
import os
import random
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import GOLDEN, processes, same_weights, script
from PIL import Image
from torch.nn import functional as F

import finetune
from arm import ARMClassifier, ARMDetector, ARMSegmenter, BadInput, UPerHead, load_weights
from finetune import CocoFiles, SceneFiles, evaluate_detector, evaluate_segmenter, pad_to_square, resize_image, slide
from pretrain import Images, learning_rate

rle = pytest.importorskip("pycocotools.mask")
CPU = torch.device("cpu")
TINY = ["--model", "arm_tiny", "--image_size", 64, "--patch_size", 16, "--batch_size", 4, "--epochs", 2, "--workers", 0,
        "--warmup_epochs", 0.5, "--blr", 0.05, "--drop_path", 0.2, "--eval_every", 2, "--device", "cpu"]
ARGS = SimpleNamespace(image_size=64, batch_size=4, accum_steps=1, workers=0)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "dense_expected.npz").items()}


def narrow(module):
    module.MODELS["arm_tiny"] = dict(dim=16, depth=4)
    module.ARMDetector, module.ARMSegmenter = (partial(kind, channels=8) for kind in (ARMDetector, ARMSegmenter))


def write_coco(folder, part, n, seed=0, crowds=(), empty=(), categories=(3, 7, 50)):
    """n images of four rectangles, as polygons, as run lengths in numbers and as run lengths in text."""
    chance, images, annotations = random.Random(seed), [], []
    (folder / part).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for i in range(n):
        height, width = ((48, 64), (48, 96), (96, 48))[i % 3]  # resized to 64 pixels these keep their proportions
        images.append(dict(id=100 + 7 * i, file_name=f"{i}.png", height=height, width=width))
        pixels = np.full((height, width, 3), 100, np.uint8)
        for k in range(0 if i in empty else 4):
            w, h = chance.randint(12, 30), chance.randint(12, 30)
            x, y = chance.randint(0, width - w), chance.randint(0, height - h)
            mask = np.zeros((height, width), np.uint8)
            mask[y : y + h, x : x + w] = 1
            pixels[y : y + h, x : x + w] = [chance.randint(0, 255) for _ in range(3)]
            code = rle.encode(np.asfortranarray(mask))
            changes = np.flatnonzero(np.diff(mask.T.flatten())) + 1
            numbers = np.diff([*[0] * (1 + mask[0, 0]), *changes, mask.size])  # run lengths begin with those of 0
            shapes = [[[x, y, x + w, y, x + w, y + h, x, y + h]], dict(size=[height, width], counts=numbers.tolist()),
                      dict(code, counts=code["counts"].decode())]
            annotations.append(dict(
                id=len(annotations) + 1, image_id=images[-1]["id"], category_id=categories[k % len(categories)],
                iscrowd=int(i in crowds), segmentation=shapes[2 if i in crowds else k % 3], area=w * h,
                bbox=[x, y, w, h]))
        Image.fromarray(pixels).save(folder / part / f"{i}.png")
    names = [dict(id=k, name=f"thing {k}") for k in reversed(categories)]
    (folder / "annotations" / f"instances_{part}.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=names)))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, "train2017", 10, crowds=[1], empty=[2])
    return write_coco(folder, "val2017", 5, seed=1, crowds=[1], empty=[2])


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("ade20k"), torch.Generator().manual_seed(0)
    for part, n in (("training", 8), ("validation", 5)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for i in range(n):
            labels = torch.randint(5, (3, 4), generator=g).byte().repeat_interleave(24, 0).repeat_interleave(24, 1)
            pixels = (50 * labels)[..., None].repeat(1, 1, 3)
            Image.fromarray(pixels.numpy()).save(folder / "images" / part / f"{i}.png")
            file = Image.fromarray(labels.numpy())
            file.putpalette([k for k in range(256) for _ in range(3)])  # which is not to be looked at
            file.save(folder / "annotations" / part / f"{i}.png")
    return folder


# The heads


def named_as(golden, model, prefix, renamed):
    """Load the golden weights under `prefix` into a model; renamed: its name of each of them."""
    found = {renamed(k.removeprefix(prefix)): v for k, v in golden.items() if k.startswith(prefix)}
    assert found.keys() == model.state_dict().keys()
    model.load_state_dict(found)
    return model.eval()


def test_the_head_of_upernet_computes_what_mmsegmentations_does(golden):
    def renamed(name):
        for there, here in ((".conv.", ".0."), (".bn.", ".1."), ("conv_seg.", "classify.1."),
                            ("psp_modules.", "pools."), ("fpn_bottleneck.", "fuse."), ("bottleneck.", "top."),
                            ("lateral_convs.", "laterals."), ("fpn_convs.", "smooth.")):
            name = name.replace(there, here)
        return name

    head = named_as(golden, UPerHead(16, 8, 7), "decode_head.", renamed)
    torch.testing.assert_close(head([golden[f"map{i}"] for i in range(4)]), golden["logits"], atol=1e-5, rtol=0)


def test_the_auxiliary_head_computes_what_mmsegmentations_does(golden):
    model = ARMSegmenter(32, 16, 16, 4, 7, channels=8)
    of = {"convs.0.conv.": "0.0.", "convs.0.bn.": "0.1.", "conv_seg.": "2."}
    head = model.auxiliary_head
    head[0][0] = torch.nn.Conv2d(16, 8, 3, padding=1, bias=False)  # ours has 256 channels
    head[0][1], head[2] = torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 7, 1)
    named_as(golden, head, "auxiliary_head.",
             lambda name: next(name.replace(k, v) for k, v in of.items() if name.startswith(k)))
    torch.testing.assert_close(head(golden["map2"]), golden["auxiliary_logits"], atol=1e-5, rtol=0)


def test_the_pyramid_computes_what_detectron2s_does(golden):
    levels = {2: (0, 4, 5), 3: (0, 1, 2), 4: (0, 0, 1), 5: (0, 1, 2)}  # places of the level's own module, 1x1 and 3x3

    def renamed(name):
        level, place, *rest = name.split(".")
        level, place, rest = int(level[-1]), int(place), ".".join(rest)
        _, one, three = levels[level]
        if place in (one, three):
            return f"{level - 2}.{1 + 2 * (place == three) + rest.startswith('norm.')}.{rest.removeprefix('norm.')}"
        return f"{level - 2}.0.{f'{place}.' if level == 2 else ''}{rest}"

    model = ARMDetector(64, 16, 32, 4, 3, channels=16)
    named_as(golden, model.pyramid, "pyramid.", renamed)
    seen = {}
    model.eval().features = lambda _: golden["pyramid_in"].permute(0, 2, 3, 1)
    model.rpn.forward = lambda images, maps, targets: (seen.update(maps), ([], {}))[1]
    model.roi_heads.forward = lambda *_: ([], {})
    model(torch.zeros(2, 3, 64, 64))
    for name, expected in zip(("0", "1", "2", "3", "pool"), ("p2", "p3", "p4", "p5", "p6")):
        torch.testing.assert_close(seen[name], golden[f"pyramid_{expected}"], atol=1e-5, rtol=0)


def test_windows_are_averaged_as_mmsegmentation_does(golden):
    def model(x):
        i, j = torch.arange(32)[:, None], torch.arange(32)
        return torch.einsum("kc,bcij->bkij", golden["window_weight"], x) * (1 + i / 31 + 2 * j / 31)

    for k in range(5):
        torch.testing.assert_close(slide(model, golden[f"slide_in{k}"], 32), golden[f"slide_out{k}"], atol=1e-5, rtol=0)


def test_miou_and_pixel_accuracy_are_mmsegmentations(golden, tmp_path):
    labels, predicted = golden["miou_labels"], golden["miou_predicted"]
    for kind, pictures in (("annotations", labels), ("images", predicted[..., None].repeat(1, 1, 1, 3))):
        (tmp_path / kind / "validation").mkdir(parents=True)
        for i, picture in enumerate(pictures):  # what is predicted is told by the image's pixels
            Image.fromarray(picture.numpy()).save(tmp_path / kind / "validation" / f"{i}.png")

    class Stub(torch.nn.Module):
        def forward(self, images):
            pixels = images[:, 0] * 0.229 + 0.485
            return F.one_hot((255 * pixels).round().long(), 150).permute(0, 3, 1, 2).float()

    args = SimpleNamespace(**{**vars(ARGS), "image_size": 20})
    dataset = Images(SceneFiles(str(tmp_path), "validation"), partial(resize_image, 20), replace=False)
    results, _ = evaluate_segmenter(Stub(), dataset, args, CPU)
    assert results["miou"] == pytest.approx(100 * golden["miou"].item(), abs=1e-3)
    assert results["pixel_accuracy"] == pytest.approx(100 * golden["pixel_accuracy"].item(), abs=1e-3)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_every_parameter_has_a_gradient_though_nothing_is_to_be_found(task):
    if task == "detect":
        model = ARMDetector(64, 16, 16, 4, 3, channels=8)
        targets = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), masks=torch.zeros(0, 64, 64).byte())] * 2
    else:
        model, targets = ARMSegmenter(64, 16, 16, 4, 3, channels=8), torch.full((2, 64, 64), 255, dtype=torch.uint8)
    loss = model(torch.randn(2, 3, 64, 64), targets)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_boxes_are_computed_in_float32_and_at_fixed_scales():
    model, seen = ARMDetector(256, 16, 16, 4, 3, channels=8).eval(), {}
    model.rpn.anchor_generator.register_forward_hook(lambda m, given, anchors: seen.update(anchors=anchors))
    model.roi_heads.box_roi_pool.register_forward_hook(lambda m, *_: seen.update(scales=m.scales))
    for image in (torch.zeros(1, 3, 256, 256), torch.randn(1, 3, 256, 256)):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(image)
        assert seen["anchors"][0].dtype == torch.float32 == found[0]["boxes"].dtype
        assert seen["scales"] == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    corner = seen["anchors"][0][-3:].reshape(-1, 2, 2).mean(dim=1)  # centres of the last place of stride 64
    assert torch.equal(corner, torch.full((3, 2), 192.0))


@pytest.mark.parametrize("file", ["official_pretrain.pth", "official_finetune224.pth", "ours"])
@pytest.mark.parametrize("kind", [ARMDetector, ARMSegmenter])
def test_an_encoder_is_loaded_and_heads_stay_fresh(tmp_path, capsys, file, kind):
    path = GOLDEN / file
    if file == "ours":
        path, classifier = tmp_path / "ours.pth", ARMClassifier(64, 16, 16, 12, 10)
        torch.save(dict(model=classifier.state_dict()), path)
    model = kind(128, 16, 16, 12, 3, channels=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = load_weights(model, path)
    heads = {"pyramid", "rpn", "roi_heads"} if kind is ARMDetector else {"pyramid", "head", "auxiliary_head"}
    extra = {"norm", "cls_token"} if file == "official_pretrain.pth" else set()
    assert heads <= fresh <= heads | extra
    assert f"fresh: {', '.join(sorted(fresh))};" in capsys.readouterr().out
    for name, tensor in model.state_dict().items():
        learned = name.startswith(("layers.", "patch_embed."))
        assert torch.equal(tensor, before[name]) != learned or name.startswith(("norm", "cls_", "pos_")) or (
            name.endswith((".bias", "A_log", ".D")) or ".norm" in name)


def test_a_detector_of_other_classes_gives_its_pyramid_and_a_fresh_head(tmp_path):
    torch.save(dict(model=ARMDetector(64, 16, 16, 4, 3, channels=8).state_dict()), tmp_path / "c.pth")
    assert load_weights(ARMDetector(64, 16, 16, 4, 5, channels=8), tmp_path / "c.pth") == {"roi_heads"}


# The data


def val_of(coco):
    return Images(CocoFiles(str(coco), "val2017"), partial(pad_to_square, 64), replace=False)


class Oracle(torch.nn.Module):
    """Finds what the annotations say, in images of 64 pixels; of it, `share` of the objects."""

    def __init__(self, coco, share=slice(None)):
        super().__init__()
        found = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
        categories = sorted(one["id"] for one in found["categories"])
        self.answers = []
        for image in found["images"]:
            its = [one for one in found["annotations"] if one["image_id"] == image["id"] and not one["iscrowd"]][share]
            scale = 64 / max(image["height"], image["width"])
            boxes = torch.tensor([one["bbox"] for one in its]).view(-1, 4).float()
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([categories.index(one["category_id"]) + 1 for one in its], dtype=torch.int64)
            self.answers.append(dict(boxes=boxes * scale, labels=labels, scores=torch.ones(len(its)),
                                     masks=torch.ones(len(its), 1, 28, 28)))

    def forward(self, images):
        answers, self.answers = self.answers[: len(images)], self.answers[len(images) :]
        return answers


def test_the_truth_has_an_ap_of_100_half_of_it_half_the_recall_and_nothing_0(coco):
    results, _ = evaluate_detector(Oracle(coco), val_of(coco), ARGS, CPU)
    assert results["box_AP"] == 100 and results["mask_AP"] > 90  # masks are pasted at 28 x 28: their edges are blurred
    assert len(results["box"]) == len(results["mask"]) == 12
    # One object of the first and the third category of 3 in each image: every second of its 4
    half, _ = evaluate_detector(Oracle(coco, slice(None, None, 2)), val_of(coco), ARGS, CPU)
    found, there = np.array([3, 0, 3]), np.array([6, 3, 3])
    assert half["box"]["AR100"] == pytest.approx(100 * (found / there).mean(), abs=1e-2)
    none, _ = evaluate_detector(Oracle(coco, slice(0)), val_of(coco), ARGS, CPU)
    assert none["box_AP"] == none["mask_AP"] == none["mask"]["AR100"] == 0
    json.dumps([results, half, none])


def test_images_of_crowds_or_of_nothing_are_evaluated_and_not_trained_on(coco):
    train, val = (CocoFiles(str(coco), part) for part in ("train2017", "val2017"))
    assert [train.name(i) for i in range(len(train))] == [f"{i}.png" for i in (0, 3, 4, 5, 6, 7, 8, 9)]
    assert len(val) == 5 and val.categories == [3, 7, 50] and val.classes == ["thing 3", "thing 7", "thing 50"]
    found = json.loads((coco / "annotations" / "instances_train2017.json").read_text())["annotations"]
    image, target = train[1]
    assert target["labels"] == [1, 2, 3, 1]
    for mask, one in zip(target["masks"], [one for one in found if one["image_id"] == 100 + 7 * 3]):
        x, y, w, h = one["bbox"]
        assert mask.sum() == w * h == mask[y : y + h, x : x + w].sum()  # in each of three formats


def test_boxes_of_random_crops_are_positive_inside_and_those_of_their_masks(coco):
    dataset, objects = Images(CocoFiles(str(coco), "train2017"), partial(finetune.jitter_objects, 64)), 0
    for epoch in range(25):
        image, target, _ = dataset[epoch, epoch % len(dataset)]
        assert image.shape == (3, 64, 64) and target["masks"].shape[1:] == (64, 64)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) and target["boxes"].shape[1] == 4
        for box, mask in zip(target["boxes"].tolist(), target["masks"]):
            y, x = mask.nonzero().T
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1] and 0 <= min(box) and max(box) <= 64
            objects += 1
    assert objects > 25


def test_labels_of_random_crops_are_classes_or_255(ade):
    dataset, seen = Images(SceneFiles(str(ade), "training"), finetune.segmentation_augment(64)), set()
    for epoch in range(25):
        image, labels, _ = dataset[epoch, epoch % len(dataset)]
        assert image.shape == (3, 64, 64) and labels.shape == (64, 64) and type(labels) is torch.Tensor
        seen |= set(labels.flatten().tolist())
    assert seen == {0, 1, 2, 3, 255}  # of 1 to 4 in the files; 0 there is none


def bad_coco(folder, what):
    if what == "folder":
        shutil.rmtree(folder / "annotations")
    elif what == "json":
        (folder / "annotations" / "instances_train2017.json").write_text('{"images": [')
    elif what == "keys":
        (folder / "annotations" / "instances_train2017.json").write_text('{"images": []}')
    elif what == "image":
        (folder / "train2017" / "4.png").unlink()


@pytest.mark.parametrize("what, sentence", [
    ("folder", "cannot read"), ("json", "is not COCO's JSON"), ("keys", "is not COCO's JSON"),
    ("image", "train2017 has no 4.png, which")])
def test_bad_coco_folders_are_told_in_a_sentence(coco, tmp_path, what, sentence):
    folder = tmp_path / "coco"
    shutil.copytree(coco, folder)
    bad_coco(folder, what)
    with pytest.raises(BadInput, match=sentence):
        CocoFiles(str(folder), "train2017")


def without_pycocotools(module):
    narrow(module)
    module.COCO = None


@pytest.mark.parametrize("argv, before, sentence", [
    (["--task", "detect"], narrow, "--task detect needs --data"),
    (["--task", "detect", "--data", "nowhere"], narrow, "cannot read nowhere/train2017, No such file"),
    (["--task", "detect", "--data", "nowhere"], without_pycocotools, "--task detect needs pycocotools"),
    (["--task", "segment", "--data", "nowhere"], narrow, "There is no folder nowhere/images/training"),
    (["--task", "segment", "--data", "nowhere", "--predict", "x"], narrow, "are for --task classify"),
    (["--task", "segment", "--data", "nowhere", "--batch_size", 1], narrow, "needs two images or more at a time"),
    (["--task", "guess"], narrow, "invalid choice")])
def test_what_cannot_be_done_is_told_in_a_sentence(tmp_path, argv, before, sentence):
    code, output = script("finetune", *argv, "--out", tmp_path, "--device", "cpu", before=before)
    assert code == 2 and sentence in output and "Traceback" not in output, output


def test_an_image_without_labels_is_told_in_a_sentence(ade, tmp_path):
    shutil.copytree(ade, tmp_path / "ade")
    (tmp_path / "ade/annotations/training/3.png").unlink()
    with pytest.raises(BadInput, match=r"there is no .*annotations/training/3.png"):
        SceneFiles(str(tmp_path / "ade"), "training")


def test_what_cannot_be_decoded_is_replaced_or_left_out(coco, ade, tmp_path):
    shutil.copytree(coco, tmp_path / "coco")
    for name in ("train2017/0.png", "val2017/0.png"):
        (tmp_path / "coco" / name).write_bytes(b"no image")
    *_, unreadable = Images(CocoFiles(str(tmp_path / "coco"), "train2017"), partial(finetune.jitter_objects, 64))[0, 0]
    assert unreadable == 0
    oracle = Oracle(tmp_path / "coco")
    results, left_out = evaluate_detector(oracle, val_of(tmp_path / "coco"), ARGS, CPU)
    assert left_out == [0] and results["box_AP"] == 100
    shutil.copytree(ade, tmp_path / "ade")
    (tmp_path / "ade/annotations/training/3.png").write_bytes(b"no image")
    dataset = Images(SceneFiles(str(tmp_path / "ade"), "training"), finetune.segmentation_augment(64))
    assert dataset[0, 3][2] == 3 and dataset[0, 2][2] == -1
    Image.new("RGB", (96, 72)).save(tmp_path / "ade/annotations/training/2.png")  # of which channel, no one can know
    assert dataset[0, 2][2] == 2 and dataset[0, 1][2] == -1


def test_strips_of_which_resizing_leaves_nothing_are_replaced_or_left_out(coco, ade, tmp_path):
    shutil.copytree(coco, tmp_path / "coco")
    for part in ("train2017", "val2017"):
        Image.new("RGB", (600, 4)).save(tmp_path / "coco" / part / "0.png")
    *_, unreadable = Images(CocoFiles(str(tmp_path / "coco"), "train2017"), partial(finetune.jitter_objects, 64))[0, 0]
    assert unreadable == 0 and val_of(tmp_path / "coco")[0, 0][2] == 0
    shutil.copytree(ade, tmp_path / "ade")
    Image.new("RGB", (6000, 1)).save(tmp_path / "ade/images/training/1.png")
    Image.new("L", (6000, 1)).save(tmp_path / "ade/annotations/training/1.png")
    dataset = Images(SceneFiles(str(tmp_path / "ade"), "training"), finetune.segmentation_augment(64))
    assert dataset[0, 1][2] == 1


# The runs


def test_rates_fall_in_steps_to_detect_and_in_a_line_to_segment():
    args = SimpleNamespace(blr=256.0, batch_size=1, warmup_epochs=1, epochs=12)
    assert [learning_rate(e, args, 0.0, "steps") for e in (0.5, 1, 8.9, 9, 11)] == [0.5, 1, 1, 0.1, 0.1**2]
    assert [learning_rate(e, args, 0.0, "line") for e in (0.5, 1, 6.5, 12)] == [0.5, 1, 0.5, 0]


def test_the_recipes_are_vitdets_and_swin_transformers(monkeypatch):
    def args_of(*argv):
        monkeypatch.setattr("sys.argv", ["finetune.py", "--data", "x", "--task", *argv])
        return finetune.get_args()

    args = args_of("detect", "--model", "arm_large")
    assert (args.blr * args.batch_size / 256, args.batch_size, args.weight_decay) == (1e-4, 64, 0.1)
    assert (args.layer_decay, args.drop_path, args.ema_decay, args.schedule) == (0.8, 0.4, 0, "steps")
    args = args_of("segment", "--epochs", "3")
    assert args.blr * args.batch_size / 256 == pytest.approx(6e-5) and (args.batch_size, args.epochs) == (16, 3)
    assert (args.layer_decay, args.drop_path, args.weight_decay, args.schedule) == (0.9, 0.1, 0.05, "line")


@pytest.fixture(scope="module")
def alone(coco, ade, tmp_path_factory):
    """The folders of a run of each task, left alone."""
    folders = {task: tmp_path_factory.mktemp(task) for task in ("detect", "segment")}
    for task, data in (("detect", coco), ("segment", ade)):
        code, output = script("finetune", "--task", task, "--data", data, *TINY, "--out", folders[task], before=narrow)
        assert code == 0, output
    return folders


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_run_writes_its_results_and_a_picture(alone, task):
    one, two = map(json.loads, (alone[task] / "log.jsonl").read_text().splitlines())
    name = "box_AP" if task == "detect" else "miou"
    assert name not in one and two[name] >= 0 and "ema_top1" not in two and Image.open(alone[task] / "predictions.png")
    assert "model_ema" not in torch.load(alone[task] / "best.pth", weights_only=True)
    assert task == "segment" or len(two["box"]) == len(two["mask"]) == 12


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(alone, coco, ade, tmp_path, task):
    argv = ["--task", task, "--data", coco if task == "detect" else ade, *TINY, "--out", tmp_path]
    code, _ = script("finetune", *argv, "--checkpoint_minutes", 0, before=killed_in_the_third_step)
    assert code == -signal.SIGKILL and (tmp_path / "last.pth").exists()
    code, output = script("finetune", *argv, before=narrow)
    assert code == 0 and "now at step 2" in output, output
    assert same_weights(alone[task] / "last.pth", tmp_path / "last.pth")


def killed_in_the_third_step(module):
    narrow(module)
    step, steps = module.optimizer_step, []

    def counted(*args):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(*args)
    module.optimizer_step = counted


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_two_processes_evaluate_as_one_does(alone, coco, ade, task):
    argv = ["--data", coco if task == "detect" else ade, "--eval", alone[task] / "last.pth", "--device", "cpu",
            "--batch_size", 2, "--task", task, "--workers", 0]
    code, one = script("finetune", *argv, before=many_detections)
    assert code == 0, one
    runs = processes("finetune", *argv, before=many_detections)
    (code, two), (other, _) = [run.wait() for run in runs]
    assert code == other == 0, two
    results = [json.loads(out[out.index("{") : out.index(" over ")]) for out in (one, two)]
    assert results[0] == results[1] and results[0]["box_AP" if task == "detect" else "miou"] > 0


def many_detections(module):
    """Every box counts, however low its score, so that there is something to compare."""
    narrow(module)
    detector = module.ARMDetector

    def sure(*args, **kwargs):
        model = detector(*args, **kwargs)
        model.roi_heads.score_thresh = 0.0
        return model
    module.ARMDetector = sure
