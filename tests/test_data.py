"""Images: what is read and counted, how it is cropped and mixed, and that seed, epoch and index decide every choice."""

import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import finetune
from arm import BadInput
from finetune import (GREY, RandAugment, RandomErasing, class_indices, eval_transform, find_images, in_order, labels_of,
                      read_classes, read_real_labels, train_transform)
from pretrain import MEAN, STD, Drawings, ImageFiles, Images, list_images, load, normalize, read_image, shuffled

ARGS = SimpleNamespace(image_size=16, crop_scale=0.08, augment=9, erasing=0.25, workers=0, batch_size=8, accum_steps=1,
                       epochs=3, seed=0)
CPU = torch.device("cpu")


def photo(height=60, width=80):
    """A smooth picture, (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width] / 20
    return (127 + 120 * np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y)], -1)).astype(np.uint8)


# Reading


def save_kinds(folder):
    """One picture in many formats; returns what each file should read as, by PIL."""
    image = Image.fromarray(photo())
    rotated = Image.Exif()
    rotated[0x112] = 6
    image.save(folder / "rgb.jpg", quality=95)
    image.save(folder / "rgb.png")
    image.save(folder / "rgb.webp", lossless=True)
    image.save(folder / "rgb.bmp")
    image.save(folder / "rgb.tif")
    image.save(folder / "exif.jpg", exif=rotated)
    image.save(folder / "jpeg.png", format="JPEG")
    image.convert("L").save(folder / "grey.jpg")
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("1").save(folder / "bits.png")
    image.convert("LA").save(folder / "grey_alpha.png")
    alpha = Image.fromarray(np.dstack([photo(), np.full(photo().shape[:2], 7, np.uint8)]))
    alpha.save(folder / "alpha.png")
    alpha.save(folder / "alpha.webp", lossless=True)
    image.crop((0, 0, 1, 1)).save(folder / "one_pixel.png")
    return sorted(os.listdir(folder))


def test_every_format_reads_as_pil_reads_it_into_three_channels(tmp_path):
    names = save_kinds(tmp_path)
    assert len(names) == 16
    for name in names:
        expected = v2.functional.pil_to_tensor(Image.open(tmp_path / name).convert("RGB"))
        ours = read_image(str(tmp_path / name))
        assert ours.shape == expected.shape and ours.dtype == torch.uint8, name
        assert (ours.int() - expected.int()).abs().max() <= 1, name
        cropped = train_transform(ARGS)(ours)
        assert cropped.shape == (3, 16, 16) and cropped.dtype == torch.uint8, name


@pytest.mark.parametrize("name, kind", [("a.jpg", "GIF"), ("a.png", "GIF"), ("a.webp", "GIF"), ("a.jpeg", "WEBP"),
                                        ("a.webp", "WEBP"), ("a.png", "PNG"), ("a.tif", "TIFF")])
def test_an_animation_reads_as_its_first_frame_whatever_its_name(tmp_path, name, kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
    image = read_image(str(tmp_path / name))
    assert image.shape == (3, 6, 8) and image.dtype == torch.uint8
    assert (image.int() - torch.tensor([255, 0, 0]).view(3, 1, 1)).abs().max() <= 2


def write_png16(path, pixels):
    """pixels: uint16 (H, W, channels), of which PIL writes grey alone."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


@pytest.mark.parametrize("with_decoder", [True, False])
def test_of_16_bits_the_high_byte_is_kept(tmp_path, monkeypatch, with_decoder):
    if not with_decoder:  # PIL reads all then
        monkeypatch.delattr("torchvision.io.decode_image")
    grey = (np.arange(600).reshape(20, 30) * 109).astype(np.uint16)  # 0 to 65291
    rgb = np.dstack([grey, grey[::-1], grey[:, ::-1]])
    big_endian = Image.frombytes("I;16B", (30, 20), grey.astype(">u2").tobytes())
    for image, name in ((Image.fromarray(grey), "grey.png"), (Image.fromarray(grey), "grey.tif"),
                        (Image.fromarray(grey.astype(np.int32)), "grey32.tif"), (big_endian, "big_endian.tif")):
        image.save(tmp_path / name)
    assert Image.open(tmp_path / "big_endian.tif").mode == "I;16B"
    (tmp_path / "grey.pgm").write_bytes(b"P5\n30 20\n65535\n" + grey.astype(">u2").tobytes())
    write_png16(tmp_path / "grey_alpha.png", np.dstack([grey, grey // 2]))
    write_png16(tmp_path / "rgb.png", rgb)
    write_png16(tmp_path / "rgb_alpha.png", np.dstack([rgb, grey // 2]))
    for name in os.listdir(tmp_path):
        image = read_image(str(tmp_path / name))
        expected = rgb if name.startswith("rgb") else np.dstack([grey] * 3)
        assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0).numpy(), expected >> 8), name
    (tmp_path / "rgb.ppm").write_bytes(b"P6\n30 20\n65535\n" + rgb.astype(">u2").tobytes())
    read = read_image(str(tmp_path / "rgb.ppm")).permute(1, 2, 0).numpy()
    assert np.abs(read.astype(int) - (rgb >> 8)).max() <= 1  # PIL itself makes 8 bits of these, and rounds


def test_floats_are_read_from_0_to_1(tmp_path):
    shares = np.arange(256, dtype=np.float32).reshape(16, 16) / 255
    Image.fromarray(shares).save(tmp_path / "float.tif")
    image = read_image(str(tmp_path / "float.tif"))
    assert image.dtype == torch.uint8 and image.tolist() == np.arange(256).reshape(1, 16, 16).repeat(3, 0).tolist()


@pytest.mark.parametrize("pixels", [np.int32([[0, 65536]]), np.int32([[-1, 5]]), np.float32([[0, 1.01]]),
                                    np.float32([[-0.01, 1]]), np.float32([[0, np.nan]]), np.float32([[0, np.inf]])])
def test_values_of_another_range_are_refused_and_the_range_named(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "other.tif")
    with pytest.raises(BadInput, match="its values, .*, are not from 0 to") as refused:
        read_image(str(tmp_path / "other.tif"))
    assert f"{pixels.min():g} to {pixels.max():g}, are" in str(refused.value)  # as they are in the file
    assert Images(ImageFiles(str(tmp_path), ["other.tif"]), eval_transform(8), replace=False)[0, 0][1:] == (-1, 0)


# Which files are images, and of which class


def test_listing_finds_all_images_below_a_folder_in_a_fixed_order(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "00.png").rename(tmp_path / "b" / "00.PnG")
    assert list_images(tmp_path) == ["a/deep/00.png", "b/00.PnG", "b/01.png"]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN",
                                    "System Volume Information"])
def test_what_systems_and_editors_leave_is_no_data(tmp_path, capsys, hidden):
    folder = tmp_path / ".data"  # which is hidden itself, but asked for
    for part in ("train", "val"):
        for place in (folder / part, folder / part / "cat"):
            write_images(place / hidden / "deep", 1)
            write_images(place / hidden, 1)
        write_images(folder / part / "cat", 2)
        for left in ("._00.png", ".DS_Store"):
            (folder / part / "cat" / left).write_bytes(b"no image")
    assert find_images(folder) == (["cat"], ["cat/00.png", "cat/01.png"], ["cat/00.png", "cat/01.png"])
    assert capsys.readouterr().out == ""


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
    write_images(tmp_path / "elsewhere", 2)
    write_images(tmp_path / "data" / "cat", 1)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "hound").symlink_to(tmp_path / "elsewhere")  # a second link
    (tmp_path / "data" / "zoo").symlink_to(tmp_path / "data")  # a circle
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)  # another
    (tmp_path / "data" / "cat" / "01.png").symlink_to(tmp_path / "elsewhere" / "00.png")  # of a file
    assert list_images(tmp_path / "data") == ["cat/00.png", "cat/01.png", "dog/00.png", "dog/01.png"]
    assert list_images(tmp_path / "data" / "dog")[:2] == ["00.png", "01.png"]  # the folder itself may be a link


def test_a_link_between_classes_moves_no_images_from_one_to_the_other(tmp_path):
    write_images(tmp_path / "cat", 1)
    write_images(tmp_path / "dog", 1)
    (tmp_path / "cat" / "related").symlink_to(tmp_path / "dog")
    (tmp_path / "another").symlink_to(tmp_path / "dog")
    assert list_images(tmp_path) == ["cat/00.png", "dog/00.png"]


def test_a_link_to_the_folder_above_does_not_list_images_again(tmp_path):
    write_images(tmp_path / "data", 1)
    write_images(tmp_path / "outside", 1)
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    assert list_images(tmp_path / "data") == ["00.png", "up/outside/00.png"]


@pytest.mark.parametrize("locked", ["", "cat", "dog/deep"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, locked):
    write_images(tmp_path / "cat", 1)
    write_images(tmp_path / "dog" / "deep", 1)
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path) == os.path.normpath(tmp_path / locked):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(BadInput, match=f"{(tmp_path / locked)} cannot be listed: Permission denied"):
        list_images(str(tmp_path))


def test_what_is_passed_over_is_told_in_one_line(tmp_path, capsys):
    write_images(tmp_path / "cat", 2)
    assert len(list_images(tmp_path)) == 2 and capsys.readouterr().out == ""  # nothing is
    (tmp_path / "cat" / "02.jfif").write_bytes(b"")
    list_images(tmp_path)
    assert capsys.readouterr().out == (f"{tmp_path}: passed over 1 files of other kinds, such as cat/02.jfif; folders "
                                       f"without images: none\n")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "00.heic").write_bytes(b"")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    list_images(tmp_path)
    assert capsys.readouterr().out == (f"{tmp_path}: passed over 2 files of other kinds, such as cat/02.jfif; folders "
                                       f"without images: dog, empty/deep\n")


def test_names_need_not_be_utf_8(tmp_path, monkeypatch):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    kinds = {b"\xff\xfe.jpg": "JPEG", b"\xff.png": "PNG", b"\xff.tif": "TIFF", "\u00e9.png".encode(): "PNG"}
    os.mkdir(folder)
    for name, kind in kinds.items():
        with open(os.path.join(folder, name), "wb") as file:
            Image.new("RGB", (4, 3), "white").save(file, kind)
    names = list_images(str(tmp_path))
    assert {os.fsencode(name) for name in names} == {b"caf\xe9/" + name for name in kinds}
    files = ImageFiles(str(tmp_path), names)
    for with_decoder in (True, False):
        if not with_decoder:
            monkeypatch.delattr("torchvision.io.decode_image")
        for i, name in enumerate(names):
            assert files.name(i) == name and files[i][0].shape == (3, 3, 4)


def test_image_files_give_name_image_and_class(images):
    classes, train, val = find_images(str(images))
    assert classes == ["cat", "dog"] and len(train) == 16 and len(val) == 11
    files = ImageFiles(str(images / "train"), train, [0] * 8 + [1] * 8)
    assert [files.name(i) for i in range(16)] == train
    image, label = files[9]
    assert label == 1 and torch.equal(image, read_image(str(images / "train" / train[9])))
    assert ImageFiles(str(images / "train"), train)[9][1] == 0  # where there are no labels


def test_an_images_label_is_the_place_of_its_first_folder():
    assert labels_of(["dog/a.png", "cat/deep/b.png", "dog/cat/c.png"], ["bird", "dog", "fish", "cat"]) == [1, 3, 1]


def test_classes_called_by_numbers_sort_as_numbers(tmp_path):
    for name in (0, 1, 2, 10, 11):
        write_images(tmp_path / "train" / f"{name}", 1)
        write_images(tmp_path / "val" / f"{name}", 1)
    assert find_images(tmp_path)[0] == ["0", "1", "2", "10", "11"]
    assert in_order({"10", "2", "009"}) == ["2", "009", "10"]
    assert in_order({"10", "2", "cat"}) == ["10", "2", "cat"]  # unless one is none


@pytest.mark.parametrize("extra, sentence", [("train/loose.png", "train/loose.png is in no class"),
                                             ("val/loose.png", "val/loose.png is in no class"),
                                             ("val/unicorn/a.png", "val has 1 classes that .*, such as unicorn")])
def test_finetuning_refuses_images_without_a_class_and_classes_without_training_images(tmp_path, extra, sentence):
    write_images(tmp_path / "train" / "cat", 1)
    write_images(tmp_path / "val" / "cat", 1)
    (tmp_path / extra).parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / extra)
    with pytest.raises(BadInput, match=sentence):
        find_images(tmp_path)


@pytest.mark.parametrize("names, classes, num_classes, expected", [
    (["dog", "cat"], ["ant", "cat", "dog"], 3, [2, 1]),  # by name, in any order, some missing
    (["1", "0"], ["0", "2", "1"], 3, [2, 0]),  # by name even where names are numbers
    (["cat", "dog", "emu"], None, 3, [0, 1, 2]),  # by place
    (["0", "1", "2"], ["ant", "cat", "dog"], 3, [0, 1, 2]),
    (["1", "2", "3"], None, 3, [0, 1, 2]),
    (["0", "7", "11"], None, 12, [0, 7, 11]),  # by number
    (["2"], ["ant", "cat", "dog"], 3, [2])])
def test_folders_are_matched_to_classes_by_name_or_place_or_number(names, classes, num_classes, expected):
    assert list(class_indices(names, classes, num_classes)) == expected


@pytest.mark.parametrize("names, classes, num_classes, sentence", [
    (["cat", "unicorn"], ["ant", "cat", "dog"], 3, "the folder unicorn is none of the 3 classes"),
    (["cat", "dog"], None, 3, "3 classes, the images are of 2, such as cat: .*--classes FILE_OR_FOLDER"),
    (["cat", "dog", "emu", "fox"], None, 3, "3 classes, the images are of 4, such as cat: .*--classes"),
    (["0", "3"], None, 3, "3 classes, the images are of 2, such as 0: .*--classes"),
    (["0", "1", "cat"], ["ant", "bee", "dog"], 3, "3 classes, such as ant, the images are of 3, such as 0"),
    (["n1", "n2", "n3"], ["ant", "bee", "dog"], 3, "3 classes, such as ant, the images are of 3, such as n1")])
def test_folders_that_match_no_classes_are_refused(names, classes, num_classes, sentence):
    with pytest.raises(BadInput, match=sentence) as refused:
        class_indices(names, classes, num_classes)
    assert classes is None or "--classes" not in str(refused.value)


def test_names_of_classes_are_read_from_a_text_or_a_folder(tmp_path):
    (tmp_path / "classes.txt").write_text("zebra\ngreat white shark\nant\n")
    assert read_classes(str(tmp_path / "classes.txt")) == ["zebra", "great white shark", "ant"]
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfzebra\r\ncaf\xe9 \r\n\r\nant")  # a BOM; no newline at its end
    assert read_classes(str(tmp_path / "classes.txt")) == ["zebra", os.fsdecode(b"caf\xe9"), "ant"]
    for name in ("zebra", "ant", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    (tmp_path / "folder" / "notes.txt").write_text("no class")
    assert read_classes(str(tmp_path / "folder")) == ["ant", "zebra"]
    for name in range(12):
        (tmp_path / "numbers" / f"{name}").mkdir(parents=True)
    assert read_classes(str(tmp_path / "numbers")) == [f"{i}" for i in range(12)]  # as finetuning sorts them
    with pytest.raises(BadInput, match="there is no .*nowhere: --classes takes a text"):
        read_classes(str(tmp_path / "nowhere"))


# Validation protocols


@pytest.fixture
def evaluated(monkeypatch):
    """evaluated(folder, logits, classes, **flags): the results of a model that sees in an image of the grey k the
    logits of row k, and the protocol in words.
    """
    monkeypatch.setattr(finetune, "from_first_process", lambda compute: compute())
    monkeypatch.setattr(finetune, "union", lambda mine: mine)
    monkeypatch.setattr(finetune.dist, "all_reduce", lambda totals: None)

    def evaluate(folder, logits, classes=None, **flags):
        class Stub(torch.nn.Module):
            def forward(self, images):
                return logits[(images[:, 0, 4, 4] * STD[0] + MEAN[0]).mul(255).round().long()]

        args = SimpleNamespace(**dict(dict(data=str(folder), image_size=8, real_labels=None, batch_size=1,
                                           accum_steps=1, workers=0), **flags))
        source, right, protocol = finetune.validation_images(args, classes, logits.shape[1])
        dataset = Images(source, eval_transform(8), replace=False)
        results, left_out = finetune.evaluate(Stub(), dataset, args, CPU, right)
        return dict(results, names=[source.name(i) for i in range(len(source))],
                    left_out=[source.name(i) for i in left_out]), protocol

    return evaluate


def grey_images(folder, **greys):
    """Images of one grey each; greys: by folder, its name led by an underscore where it is a number."""
    for name, values in greys.items():
        for value in values:
            path = folder / name.removeprefix("_") / f"{value:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (10, 9), value).save(path)


def ranking(*orders, classes=8):
    """Logits, (images, classes), that rank the classes as the orders begin: 9, 8, 7, ...; the others have 0."""
    logits = torch.zeros(len(orders), classes)
    for row, order in zip(logits, orders):
        row[list(order)] = torch.arange(9.0, 9 - len(order), -1)
    return logits


NAMES = [f"n{i}" for i in range(8)]


def test_of_some_classes_predictions_are_taken_among_those(tmp_path, evaluated):
    """As on ImageNet-A and ImageNet-R."""
    grey_images(tmp_path / "val", n1=[0, 1], n6=[2, 3])
    logits = ranking([0, 1, 6], [6, 1], [5, 1, 6], [0, 2, 3, 4, 5, 7, 6])  # right: 0, and 3, where 1 has logit 0
    results, protocol = evaluated(tmp_path, logits, NAMES)
    assert protocol == "of 2 of 8 classes, from which predictions are taken"
    assert results["top1"] == 50 and "top5" not in results  # which would say nothing of two classes
    its_own, labels = logits[:, [1, 6]], torch.tensor([0, 0, 1, 1])
    assert results["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(its_own, labels).item(), rel=1e-5)


def test_top_5_of_some_classes_is_among_those(tmp_path, evaluated):
    grey_images(tmp_path / "val", n1=[0], n2=[1], n3=[], n4=[2], n5=[3], n6=[4], n7=[5])
    everything_else = [0, 2, 4, 5, 6, 7]
    logits = ranking([*everything_else, 1], [2], [0, 1, 2, 5, 6, 4], [0, 1, 2, 4, 6, 7, 5], [3, 6], [7])
    results, protocol = evaluated(tmp_path, logits, NAMES)
    assert protocol == "of 6 of 8 classes, from which predictions are taken"  # not of 0 and 3
    assert results["top1"] == pytest.approx(300 / 6)  # 1, 4 and 5
    assert results["top5"] == pytest.approx(400 / 6)  # and 2, whose rank is fifth without 0


@pytest.mark.parametrize("place", [".", "val"])
def test_all_classes_are_told_apart_where_all_have_images(tmp_path, evaluated, place):
    """As on ImageNet-Sketch, whose class folders stand in the folder itself."""
    grey_images(tmp_path / place, **{name: [i] for i, name in enumerate(NAMES)})
    logits = ranking(*([i] if i < 3 else [0, 1, 2, 7 if i < 7 else 6, i] for i in range(8)))
    for classes in (NAMES, None):  # by name, and by place
        results, protocol = evaluated(tmp_path, logits, classes)
        assert protocol == "8 classes" and results["top1"] == pytest.approx(300 / 8) and results["top5"] == 100


@pytest.mark.parametrize("classes", [None, [f"n{i:02}" for i in range(12)]])
def test_folders_called_0_to_n_hold_the_classes_of_those_numbers(tmp_path, evaluated, classes):
    """As on ImageNet-V2; as texts, 10 and 11 would come before 2."""
    grey_images(tmp_path, **{f"_{i}": [i] for i in range(12)})
    results, protocol = evaluated(tmp_path, ranking(*([i] for i in range(12)), classes=12), classes)
    assert results["top1"] == 100 and protocol == "12 classes"
    (tmp_path / "3" / "003.png").unlink()
    (tmp_path / "3").rmdir()  # one fewer: each still has its own number
    results, protocol = evaluated(tmp_path, ranking(*([i] for i in range(12)), classes=12), classes)
    assert results["top1"] == 100 and protocol.startswith("of 11 of 12 classes")


def real_images(folder, labels):
    """ILSVRC2012_val_0000000K.JPEG of the grey K for each K among labels, and real.json of what is right for it."""
    folder.mkdir(parents=True)
    for number in labels:
        Image.new("L", (10, 9), number).save(folder / f"ILSVRC2012_val_{number:08}.JPEG", quality=100)
    path = folder.parent / "real.json"
    path.write_text(json.dumps([labels.get(i + 1, [0]) for i in range(max(labels))]))
    return str(path)


@pytest.mark.parametrize("place", ["val", "val/n5"])  # its class folder tells nothing
def test_by_real_labels_any_of_several_is_right_and_images_without_one_are_left_out(tmp_path, evaluated, place):
    path = real_images(tmp_path / place, {1: [1], 2: [0, 3], 3: [], 5: [7], 6: [2, 4]})
    logits = ranking([], [1], [3, 0], [1], [1], [0, 1, 2, 3, 4, 5, 7], [0, 1, 3, 5, 4])
    results, protocol = evaluated(tmp_path, logits, NAMES, real_labels=str(tmp_path / path))
    assert protocol == "by their ReaL labels"
    assert [name[-6] for name in results["names"]] == ["1", "2", "5", "6"]
    assert results["top1"] == 50 and results["top5"] == 75  # 1 and 2; and 6
    shares = logits.softmax(dim=1)
    right = torch.stack([shares[1, 1], shares[2, 0] + shares[2, 3], shares[5, 7], shares[6, 2] + shares[6, 4]])
    assert results["val_loss"] == pytest.approx(-right.log().mean().item(), rel=1e-5)


def test_real_labels_are_refused_for_other_images_and_where_they_cannot_be_read(tmp_path):
    path = real_images(tmp_path / "val", {1: [1], 2: [0]})
    names = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    assert read_real_labels(path, names, 3)[1].int().tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(BadInput, match="--real_labels is for ImageNet's validation images"):
        read_real_labels(path, [*names, "cat.JPEG"], 3)
    for wrong in (names[:1] + ["ILSVRC2012_val_00000003.JPEG"], names[:1]):
        with pytest.raises(BadInput, match="cannot read --real_labels"):
            read_real_labels(path if len(wrong) == 2 else "/nowhere.json", wrong, 3)
    for text in ("[[1], [0", "[[1], [3]]", '{"a": 1}', '[["cat"], [0]]'):  # 3 is none of three classes
        (tmp_path / "real.json").write_text(text)
        with pytest.raises(BadInput, match="cannot read --real_labels .* for 3 classes"):
            read_real_labels(path, names, 3)


def test_beside_train_of_all_classes_val_of_some_is_not_restricted_to_those(tmp_path, evaluated):
    grey_images(tmp_path / "val", n1=[0, 1], n6=[2, 3])
    logits = ranking([0, 1, 6], [1], [6], [6, 7])
    for classes in (NAMES, None):
        some = ["n1", "n6"] if classes else NAMES[:-1]
        grey_images(tmp_path / "train", **{name: [0] for name in some})
        if classes:  # train/ of the same
            assert evaluated(tmp_path, logits, classes)[1].startswith("of 2 of 8 classes")
        grey_images(tmp_path / "train", **{name: [0] for name in NAMES})
        results, protocol = evaluated(tmp_path, logits, classes)
        assert protocol == "8 classes" and results["top1"] == 75  # the first is taken for an n0


def test_train_beside_val_may_hold_more_than_the_checkpoints_classes(tmp_path, evaluated):
    grey_images(tmp_path / "val", n1=[0], n6=[1])
    grey_images(tmp_path / "train", n1=[0], n2=[0], unicorn=[0], n6=[0])
    results, protocol = evaluated(tmp_path, ranking([0, 1], [2, 6]), NAMES)
    assert protocol.startswith("of 3 of 8 classes") and results["top1"] == 50  # n2 is among them


def test_folders_in_another_order_than_the_classes_are_matched_by_name(tmp_path, evaluated):
    grey_images(tmp_path, ant=[0, 1], bee=[2], cat=[3])
    classes = ["cat", "ant", "dog", "bee"]
    results, protocol = evaluated(tmp_path, ranking([1], [2, 1], [3], [1], classes=4), classes)
    assert protocol == "of 3 of 4 classes, from which predictions are taken" and results["top1"] == 75  # all but 3


def test_folders_of_some_classes_unnamed_are_refused_by_a_sentence_that_tells_of_classes(tmp_path, evaluated):
    grey_images(tmp_path / "val", n1=[0], n6=[1])
    with pytest.raises(BadInput, match="8 classes, the images are of 2, such as n1: .*--classes FILE_OR_FOLDER"):
        evaluated(tmp_path, ranking([1], [6]))
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    results, _ = evaluated(tmp_path, ranking([0, 1], [6]), read_classes(str(tmp_path / "classes.txt")))  # as it says
    assert results["top1"] == 100
    with pytest.raises(BadInput, match="the folder unicorn is none of the 8 classes"):
        grey_images(tmp_path / "val", unicorn=[0])
        evaluated(tmp_path, ranking([1], [6]), NAMES)


def test_images_of_validation_that_cannot_be_decoded_are_left_out_and_named(tmp_path, evaluated):
    grey_images(tmp_path / "val", n1=[0], n6=[1])
    (tmp_path / "val" / "n1" / "bad.png").write_bytes(b"no image")
    results, _ = evaluated(tmp_path, ranking([1], [1]), NAMES)
    assert results["left_out"] == ["n1/bad.png"] and results["top1"] == 50


# What a sample is


def items(images, seed=0, workers=0, keys=None, transform=None):
    files = ImageFiles(str(images / "train"), list_images(images / "train"))
    dataset = Images(files, transform or train_transform(ARGS), seed)
    keys = keys or [(e, i) for e in (0, 1) for i in range(16)]
    batches = (keys[i : i + 4] for i in range(0, len(keys), 4))
    return torch.cat([batch[0] for batch in load(dataset, batches, workers, CPU)])


def test_a_sample_depends_on_seed_epoch_and_index_alone(images):
    one = items(images)
    torch.manual_seed(123)
    assert torch.equal(one, items(images, workers=3))
    keys = [(e, i) for e in (1, 0) for i in reversed(range(16))]
    assert torch.equal(one.flip(0), items(images, keys=keys))
    assert not torch.equal(one[:16], one[16:])
    assert not torch.equal(one, items(images, seed=1))


def test_drawing_samples_leaves_the_callers_random_state_alone(images):
    files = ImageFiles(str(images / "train"), list_images(images / "train"))
    state = torch.random.get_rng_state()
    Images(files, train_transform(ARGS))[0, 1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_epoch_visits_every_image_once_and_processes_share_each_batch(monkeypatch):
    def batches(rank, processes, accum_steps=1, start=0, n=16):
        for name, value in dict(RANK=rank, WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT=1).items():
            monkeypatch.setenv(name, str(value))
        args = SimpleNamespace(batch_size=8, accum_steps=accum_steps, epochs=3, seed=5)
        return list(shuffled(n, args, start))

    whole = batches(0, 1)
    assert [len(b) for b in whole] == [8] * 6
    assert sorted(whole[2] + whole[3]) == [(1, i) for i in range(16)]
    assert whole[0] + whole[1] != [(0, i) for _, i in whole[2] + whole[3]]
    two = [a + b for a, b in zip(batches(0, 2), batches(1, 2))]
    assert two == whole
    quarters = batches(0, 2, accum_steps=2), batches(1, 2, accum_steps=2)
    assert quarters[0][0] + quarters[0][1] + quarters[1][0] + quarters[1][1] == whole[0]
    assert batches(0, 1, start=3) == whole[3:]
    assert len(batches(0, 1, n=23)) == 6  # seven images are left over in each epoch


def test_crops_are_those_of_torchvisions_pil_path(tmp_path):
    Image.fromarray(photo(300, 400)).save(tmp_path / "photo.png")
    tensor, pil = read_image(str(tmp_path / "photo.png")), Image.open(tmp_path / "photo.png")
    crop = v2.RandomResizedCrop(96, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC)
    boxes, areas = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        boxes.append(v2.RandomResizedCrop.make_params(crop, [tensor]))
        torch.manual_seed(seed)
        assert v2.RandomResizedCrop.make_params(crop, [pil]) == boxes[-1]
        areas.append(boxes[-1]["height"] * boxes[-1]["width"] / 120_000)
    assert 0.19 < min(areas) < 0.25 and 0.4 < np.mean(areas) < 0.65
    for seed in range(10):
        torch.manual_seed(seed)
        ours = crop(tensor)
        torch.manual_seed(seed)
        theirs = v2.functional.pil_to_tensor(crop(pil))
        assert (ours.int() - theirs.int()).abs().max() <= 2  # bicubic with antialiasing, both


def test_normalising_gives_imagenets_mean_and_spread():
    image = (torch.tensor(MEAN) * 255).round().byte().view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert normalize(image, torch.device("cpu")).abs().max() < 0.01
    white = normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), torch.device("cpu"))
    torch.testing.assert_close(white.flatten(), (1 - torch.tensor(MEAN)) / torch.tensor(STD))


@pytest.mark.parametrize("size, shorter", [(224, 256), (384, 384)])
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(size, shorter):
    image = torch.from_numpy(photo(600, 800)).permute(2, 0, 1)
    resized = v2.functional.resize(image, [shorter], interpolation=InterpolationMode.BICUBIC)
    assert min(resized.shape[1:]) == shorter
    assert torch.equal(eval_transform(size)(image), v2.functional.center_crop(resized, [size]))


@pytest.mark.parametrize("height, width", [(1, 6000), (6000, 1), (3, 5000)])
def test_of_a_strip_only_the_middle_is_resized(monkeypatch, height, width):
    strip = torch.arange(6000, dtype=torch.float).mul(255 / 6000).byte()[: max(height, width)]
    strip = strip.expand(3, height, width) if width > 1 else strip.view(1, height, 1).expand(3, height, width)
    resized, resize = [], v2.Resize.transform
    monkeypatch.setattr(v2.Resize, "transform", lambda self, image, params: resized.append(image.shape) or resize(
        self, image, params))
    out = eval_transform(224)(strip)
    assert out.shape == (3, 224, 224) and out.dtype == torch.uint8
    assert max(resized[0][1:]) <= 4 * min(resized[0][1:])  # else the rest is made 256 pixels high, too
    centre = strip[:, height // 2, width // 2].int()
    assert (out.int() - centre.view(3, 1, 1)).abs().max() <= 1  # of a slow ramp, the middle


@pytest.mark.parametrize("height, width", [(300, 300), (75, 300), (300, 75), (101, 404), (10, 7)])
def test_up_to_four_to_one_evaluation_is_resize_and_centre_crop_to_the_bit(height, width):
    image = torch.from_numpy(photo(height, width)).permute(2, 0, 1)
    plain = v2.Compose([v2.Resize(256, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    assert torch.equal(eval_transform(224)(image), plain(image))


# Files that cannot be decoded


def test_an_unreadable_file_is_replaced_by_another_the_same_one_every_time(tmp_path):
    write_images(tmp_path, 8)
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:60])
    dataset = Images(ImageFiles(str(tmp_path), list_images(tmp_path)), eval_transform(16))
    image, _, unreadable = dataset[0, 3]
    assert unreadable == 3
    assert any(torch.equal(image, dataset[0, i][0]) for i in range(8) if i != 3)
    assert torch.equal(image, dataset[0, 3][0])
    assert all(dataset[0, i][2] == -1 for i in range(8) if i != 3)
    _, label, unreadable = Images(dataset.source, eval_transform(16), replace=False)[0, 3]
    assert (label, unreadable) == (-1, 3)


def test_a_file_unreadable_for_a_moment_is_itself_in_the_next_epoch(tmp_path):
    write_images(tmp_path, 8)
    dataset = Images(ImageFiles(str(tmp_path), list_images(tmp_path)), eval_transform(16))
    (tmp_path / "03.png").rename(tmp_path / "gone")
    assert dataset[0, 3][2] == 3
    (tmp_path / "gone").rename(tmp_path / "03.png")
    image, _, unreadable = dataset[1, 3]
    assert unreadable == -1 and torch.equal(image, eval_transform(16)(read_image(str(tmp_path / "03.png"))))


def test_where_no_file_can_be_decoded_an_image_is_black(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    image, label, unreadable = Images(ImageFiles(str(tmp_path), list_images(tmp_path)), train_transform(
        SimpleNamespace(**dict(vars(ARGS), augment=0, erasing=0))))[0, 1]
    assert image.shape == (3, 16, 16) and not image.any() and (label, unreadable) == (0, 1)


def test_pil_reads_all_where_torchvision_has_no_decoder(tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "photo.jpg")
    ours = read_image(str(tmp_path / "photo.jpg"))
    monkeypatch.delattr("torchvision.io.decode_image")
    assert (read_image(str(tmp_path / "photo.jpg")).int() - ours.int()).abs().max() <= 1


# Augmentation


def test_randaugment_applies_each_of_two_operations_half_of_the_time_at_a_magnitude_drawn_around_nine():
    augment = RandAugment(9)
    torch.manual_seed(0)
    draws = [augment.make_params([])["chosen"] for _ in range(3000)]
    lengths = torch.tensor([len(draw) for draw in draws]).bincount() / 3000
    torch.testing.assert_close(lengths, torch.tensor([0.25, 0.5, 0.25]), atol=0.03, rtol=0)
    applied = [operation for draw in draws for operation in draw]
    assert len(applied) == pytest.approx(3000, rel=0.05)
    counts = [[name for name, _ in applied].count(name) for name in RandAugment.OPERATIONS]
    assert len(counts) == 15 and min(counts) > 140 and max(counts) < 260
    shears = 10 * torch.tensor([strength for name, strength in applied if name.startswith("Shear")])
    assert (shears < 0).float().mean() == pytest.approx(0.5, abs=0.1)  # of either sign
    assert shears.abs().median() == pytest.approx(9, abs=0.1) and shears.abs().max() <= 10
    assert 0.4 < shears.abs().std() < 0.52  # magnitude 9, spread 0.5, at most 10
    of_either_sign = {name for name, strength in applied if strength < 0}
    assert of_either_sign == {"Rotate", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY",
                              "TranslateX", "TranslateY"}


def augmented(image, *chosen):
    """A uint8 image (3, H, W) after RandAugment's operations, given as (name, strength)."""
    augment = RandAugment(9)
    augment.make_params = lambda flat_inputs: dict(chosen=chosen)
    out = augment(image)
    assert out.shape == image.shape and out.dtype == torch.uint8, chosen
    return out.long()


def test_randaugment_applies_what_it_has_chosen_in_order():
    values = torch.arange(256).view(16, 16)
    image = values.byte().expand(3, 16, 16)
    assert torch.equal(augmented(image), image.long())
    assert torch.equal(augmented(image, ("Invert", 0.9), ("SolarizeAdd", 0.9))[1],
                       torch.where(255 - values < 128, (255 - values + 99).clamp(max=255), 255 - values))


def test_randaugments_severities_are_timms_increasing_ones():
    values = torch.arange(256).view(16, 16)
    image = values.byte().expand(3, 16, 16)

    def applied(name, strength=0.9):
        return augmented(image, (name, strength))[1]

    assert torch.equal(applied("Solarize"), torch.where(values < 26, values, 255 - values))
    assert torch.equal(applied("Solarize", 0.0), values) and torch.equal(applied("Solarize", 1.0), 255 - values)
    assert torch.equal(applied("SolarizeAdd"), torch.where(values < 128, (values + 99).clamp(max=255), values))
    assert torch.equal(applied("Posterize"), values & 128)
    assert torch.equal(applied("Invert"), 255 - values)
    assert torch.equal(applied("Posterize", 0.0), values & 240)
    assert not applied("Posterize", 1.0).any()  # black
    for name in RandAugment.OPERATIONS:
        for strength in (0.0, 0.9, 1.0):
            applied(name, strength)
            if name not in RandAugment.ONE_SIGN:
                applied(name, -strength)


def seen_from(name, strength, width=100, height=200):
    """Where an operation takes its pixels from: x and y as linear functions of (1, x, y), (3, 2). They are read off a
    picture whose red is 2 x, and whose green is y.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = augmented(torch.stack([2 * x, y, torch.full_like(x, 255)]).byte(), (name, strength))
    assert (out == torch.tensor(GREY).view(3, 1, 1)).all(dim=0).sum() > 300 and GREY == (124, 116, 104)  # what is bare
    source = out[:2].double() / torch.tensor([2, 1]).view(2, 1, 1) + 0.5  # the middle of a pixel
    inside = (out[2] == 255) & (source > 4).all(dim=0) & (source[0] < width - 4) & (source[1] < height - 4)
    terms = torch.stack([torch.ones_like(x), x + 0.5, y + 0.5], -1)[inside].double()
    return torch.linalg.lstsq(terms, source[:, inside].T).solution


@pytest.mark.parametrize("sign", [1, -1])
def test_randaugment_turns_shears_and_moves_images_as_far_as_timm(sign):
    cos, sin = np.cos(np.radians(27)), sign * np.sin(np.radians(27))
    for name, expected, slack in (  # PIL cuts fractions of a grey off: half a grey, in the mean, is half a pixel
            ("Rotate", [[50 - 50 * cos + 100 * sin, 100 - 100 * cos - 50 * sin], [cos, sin], [-sin, cos]], 0.6),
            ("ShearX", [[0, 0], [1, 0], [sign * 0.27, 1]], 0.6),
            ("ShearY", [[0, 0], [1, sign * 0.27], [0, 1]], 0.6),
            ("TranslateX", [[sign * 40.5, 0], [1, 0], [0, 1]], 0.01),  # of a width of 100
            ("TranslateY", [[0, sign * 81], [1, 0], [0, 1]], 0.01)):  # of a height of 200
        wrong = (seen_from(name, sign * 0.9) - torch.tensor(expected, dtype=torch.double)).abs()
        assert wrong[1:].max() < 1e-3 and wrong[0].max() < slack, (name, wrong)


@pytest.mark.parametrize("strength, factor", [(0.9, 1.81), (-0.9, 0.19), (0.0, 1.0), (-1.0, 0.1)])
def test_randaugment_changes_colour_contrast_brightness_and_sharpness_by_timms_factors(strength, factor):
    def differs_by(out, expected):
        return (out.double() - torch.tensor(expected, dtype=torch.double).clamp(0, 255)).abs().max()

    pixel = torch.tensor([60, 110, 160])  # 101 in grey
    out = augmented(pixel.byte().view(3, 1, 1).expand(3, 4, 4), ("Color", strength))[:, 0, 0]
    assert differs_by(out, [101 + factor * (value - 101) for value in pixel.tolist()]) <= 1
    steps = torch.tensor([60, 180]).repeat_interleave(8).expand(3, 4, 16).byte()  # 120 in the mean
    out = augmented(steps, ("Contrast", strength))[0, 0, [0, -1]]
    assert differs_by(out, [120 - factor * 60, 120 + factor * 60]) <= 1
    out = augmented(steps, ("Brightness", strength))[0, 0, [0, -1]]
    assert differs_by(out, [factor * 60, factor * 180]) <= 1
    dot = torch.full((3, 5, 5), 26).byte()
    dot[:, 2, 2] = 130  # 66 smoothed, of weights 5 and 1 in 13; its neighbours 34
    out = augmented(dot, ("Sharpness", strength))[0, 2, [2, 1]]
    assert differs_by(out, [66 + factor * (130 - 66), 34 + factor * (26 - 34)]) <= 1


def test_erased_pixels_are_normal_noise_once_normalised():
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    erased = torch.cat([out[out != 255] for out in (RandomErasing(1.0)(image) for _ in range(30))])
    assert len(erased) > 10_000
    out = RandomErasing(1.0)(torch.zeros(3, 64, 64, dtype=torch.uint8))
    noise = normalize(out[None], torch.device("cpu"))[0][:, (out > 0).all(0)]
    assert abs(noise.mean()) < 0.15 and 0.8 < noise.std() < 1.1
    assert sum((RandomErasing(0.25)(image) != image).any().item() for _ in range(400)) == pytest.approx(100, abs=30)


@pytest.fixture
def mixing(monkeypatch, images):
    """mixing(*flags): what finetune.py mixes batches of two classes by: its main(), up to where it has made this."""
    class Made(Exception):
        pass

    def made(transforms):
        raise Made(*transforms)

    def stub(*args, **kwargs):
        return SimpleNamespace(checkpoint={}, step=0, steps_per_epoch=1, start=print, say=print)

    def mixing(*flags):
        with monkeypatch.context() as patched:
            for name, value in dict(start_processes=lambda args: CPU, from_first_process=lambda compute: compute(),
                                    Run=stub, DistributedDataParallel=stub).items():
                patched.setattr(finetune, name, value)
            patched.setattr(finetune.v2, "RandomChoice", made)
            patched.setattr("sys.argv", ["finetune.py", "--data", str(images), "--model", "arm_tiny", "--image_size",
                                         "16", "--patch_size", "8", "--batch_size", "8", "--workers", "0", *flags])
            with pytest.raises(Made) as found:
                finetune.main()
        return v2.RandomChoice(list(found.value.args))

    return mixing


def test_mixing_is_mixup_or_cutmix_with_equal_probability_and_the_recipes_alphas(mixing):
    mix = mixing()
    assert [(type(t), t.alpha, t.num_classes) for t in mix.transforms] == [(v2.MixUp, 0.8, 2), (v2.CutMix, 1.0, 2)]
    images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16), torch.tensor([0, 1])
    shares, cutmix = [], []
    torch.manual_seed(0)
    for _ in range(3000):
        mixed, targets = mix(images, labels)
        shares.append(targets[0, 0])
        cutmix.append(((mixed == 0) | (mixed == 1)).all())
    shares, cutmix = torch.stack(shares), torch.stack(cutmix)
    assert cutmix.float().mean() == pytest.approx(0.5, abs=0.03)
    assert (shares[cutmix] < 1).float().mean() > 0.9  # few boxes are empty
    assert shares[~cutmix].mean() == pytest.approx(0.5, abs=0.03)
    assert shares[~cutmix].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)  # of Beta(0.8, 0.8)
    torch.manual_seed(0)
    assert mix(images, labels)[1][0, 0] == shares[0]  # torch's random state decides


def test_one_draw_mixes_a_whole_batch_with_its_neighbours_and_their_targets_by_the_same_share(mixing):
    mix = mixing()
    images, labels = torch.randn(8, 3, 16, 16), torch.tensor([0, 1] * 4)
    torch.manual_seed(0)
    for _ in range(40):
        mixed, targets = mix(images, labels)
        share = targets[0, 0]
        own = torch.nn.functional.one_hot(labels, 2)
        torch.testing.assert_close(targets, share * own + (1 - share) * own.roll(1, 0))
        kept = mixed == images
        if kept.any() or (mixed == images.roll(1, 0)).any():  # CutMix
            assert (kept == kept[:1, :1]).all() and kept[0, 0].float().mean() == pytest.approx(share.item(), abs=1e-6)
            assert torch.equal(mixed, torch.where(kept, images, images.roll(1, 0)))
            rows, columns = (~kept[0, 0]).any(dim=1), (~kept[0, 0]).any(dim=0)
            assert torch.equal(~kept[0, 0], rows[:, None] & columns)  # a box
        else:
            torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))


@pytest.mark.parametrize("flags, expected", [(["--cutmix", "0"], [v2.MixUp]), (["--mixup", "0"], [v2.CutMix]),
                                             (["--mixup", "0", "--cutmix", "0"], [v2.Identity])])
def test_mixing_of_alpha_0_is_left_out(mixing, flags, expected):
    mix = mixing(*flags)
    assert [type(t) for t in mix.transforms] == expected
    if expected == [v2.Identity]:
        images, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
        assert all(torch.equal(a, b) for a, b in zip(mix(images, labels), (images, labels)))


# The demonstration's images


def test_drawings_are_the_same_for_the_same_seed_and_hold_ten_classes_evenly():
    one, again, other = Drawings(50, 48, seed=3), Drawings(50, 48, seed=3), Drawings(50, 48, seed=4)
    assert torch.equal(one.images, again.images) and torch.equal(one.labels, again.labels)
    assert not torch.equal(one.images, other.images)
    assert one.images.shape == (50, 3, 48, 48) and one.images.dtype == torch.uint8
    assert one.labels.bincount().tolist() == [5] * 10 and len(one.classes) == 10


def test_colour_alone_does_not_tell_the_drawings_apart():
    """A linear classifier of an image's mean colour and its spread stays far below a half."""
    drawings = Drawings(2000, 48, seed=0)
    pixels = drawings.images.float().flatten(2) / 255
    features = torch.cat([pixels.mean(2), pixels.std(2), torch.ones(2000, 1)], 1)
    one_hot = torch.nn.functional.one_hot(drawings.labels, 10).float()
    solution = torch.linalg.lstsq(features[:1000], one_hot[:1000]).solution
    accuracy = ((features[1000:] @ solution).argmax(1) == drawings.labels[1000:]).float().mean()
    assert accuracy < 0.4
