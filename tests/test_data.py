"""Images: what is read, how it is cropped and mixed, and that seed, epoch and index decide every random choice."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from finetune import RandAugment, RandomErasing, draw_mixing, eval_transform, find_images, mix, train_transform
from pretrain import (MEAN, STD, Batches, Drawings, ImageFiles, Images, list_images, make_loader, normalize, read_image)

ARGS = SimpleNamespace(image_size=16, crop_scale=0.08, augment=9, erasing=0.25, workers=0, batch_size=8, accum_steps=1,
                       epochs=3, seed=0)


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


def test_16_bit_images_keep_their_high_byte(tmp_path):
    grey = (np.arange(600).reshape(20, 30) * 100).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    assert np.array_equal(read_image(str(tmp_path / "grey16.png"))[1].numpy(), grey >> 8)


def test_listing_finds_all_images_below_a_folder_in_a_fixed_order(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "notes.txt").write_text("not an image")
    assert list_images(tmp_path) == ["a/deep/00.png", "b/00.png", "b/01.png"]


def test_image_files_give_name_image_and_class(images):
    classes, train, val = find_images(str(images), evaluate_only=False)
    assert classes == ["cat", "dog"] and len(train) == 16 and len(val) == 11
    files = ImageFiles(str(images / "train"), train, classes)
    assert [files.name(i) for i in range(16)] == train
    image, label = files[9]
    assert label == 1 and torch.equal(image, read_image(str(images / "train" / train[9])))


# What a sample is


def items(images, seed=0, workers=0, keys=None, transform=None):
    files = ImageFiles(str(images / "train"), list_images(images / "train"))
    dataset = Images(files, transform or train_transform(ARGS), seed)
    keys = keys or [(e, i) for e in (0, 1) for i in range(16)]
    loader = make_loader(dataset, [keys[i : i + 4] for i in range(0, len(keys), 4)],
                         SimpleNamespace(workers=workers), torch.device("cpu"))
    return torch.cat([batch[0] for batch in loader])


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
    draw_mixing(4, 16, 0.8, 1.0, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_epoch_visits_every_image_once_and_processes_share_each_batch(monkeypatch):
    def batches(rank, processes, accum_steps=1, start=0, n=16):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        args = SimpleNamespace(batch_size=8, accum_steps=accum_steps, epochs=3, seed=5)
        return list(Batches(n, args, start))

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


def test_pil_reads_all_where_torchvision_has_no_decoder(tmp_path, monkeypatch):
    Image.fromarray(photo()).save(tmp_path / "photo.jpg")
    ours = read_image(str(tmp_path / "photo.jpg"))
    monkeypatch.delattr("torchvision.io.decode_image")
    assert (read_image(str(tmp_path / "photo.jpg")).int() - ours.int()).abs().max() <= 1


# Augmentation


def test_randaugment_applies_each_of_two_operations_half_of_the_time_at_a_magnitude_drawn_around_nine():
    image = torch.from_numpy(photo()).permute(2, 0, 1)
    augment = RandAugment(9)
    applied = []
    augment.apply = lambda image, name, magnitude: applied.append((name, magnitude)) or image
    torch.manual_seed(0)
    for _ in range(3000):
        augment(image)
    assert len(applied) == pytest.approx(3000, rel=0.05)
    counts = [[name for name, _ in applied].count(name) for name in RandAugment._AUGMENTATION_SPACE]
    assert len(counts) == 15 and min(counts) > 140 and max(counts) < 260
    shears = torch.tensor([magnitude / 0.03 for name, magnitude in applied if name.startswith("Shear")])
    assert (shears < 0).float().mean() == pytest.approx(0.5, abs=0.1)  # of either sign
    assert shears.abs().median() == pytest.approx(9, abs=0.1) and shears.abs().max() <= 10
    assert 0.4 < shears.abs().std() < 0.52  # magnitude 9, spread 0.5, at most 10


def test_randaugments_severities_are_timms_increasing_ones():
    at = {name: magnitude(0.9, 100) for name, (magnitude, _) in RandAugment._AUGMENTATION_SPACE.items()}
    assert at["Posterize"] == 1 and at["SolarizeAdd"] == 99 and at["Rotate"] == pytest.approx(27)
    assert at["Color"] == pytest.approx(0.81) and at["ShearX"] == pytest.approx(0.27)
    assert at["TranslateY"] == pytest.approx(40.5)
    values = torch.arange(256).view(16, 16)
    image = v2.functional.to_pil_image(values.byte().expand(3, 16, 16))
    augment = RandAugment(9)

    def applied(name, magnitude):
        out = v2.functional.pil_to_tensor(augment.apply(image, name, magnitude))
        assert out.shape == (3, 16, 16), name
        return out[1].long()

    assert torch.equal(applied("Solarize", at["Solarize"]), torch.where(values < 26, values, 255 - values))
    assert torch.equal(applied("SolarizeAdd", 99), torch.where(values < 128, (values + 99).clamp(max=255), values))
    assert torch.equal(applied("Posterize", 1), values & 128)
    assert torch.equal(applied("Invert", 0.0), 255 - values)
    assert torch.equal(applied("Posterize", 4), values & 240)
    for name, (magnitude, signed) in RandAugment._AUGMENTATION_SPACE.items():
        for strength in (0.0, 0.9, 1.0):
            applied(name, magnitude(strength, 16))
            if signed:
                applied(name, -magnitude(strength, 16))
    assert not applied("Posterize", RandAugment._AUGMENTATION_SPACE["Posterize"][0](1.0, 16)).any()  # black


def test_erased_pixels_are_normal_noise_once_normalised():
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    erased = torch.cat([out[out != 255] for out in (RandomErasing(1.0)(image) for _ in range(30))])
    assert len(erased) > 10_000
    out = RandomErasing(1.0)(torch.zeros(3, 64, 64, dtype=torch.uint8))
    noise = normalize(out[None], torch.device("cpu"))[0][:, (out > 0).all(0)]
    assert abs(noise.mean()) < 0.15 and 0.8 < noise.std() < 1.1
    assert sum((RandomErasing(0.25)(image) != image).any().item() for _ in range(400)) == pytest.approx(100, abs=30)


def test_mixup_and_cutmix_mix_neighbours_and_their_targets_by_the_same_share():
    torch.manual_seed(0)
    images, targets = torch.randn(8, 3, 16, 16), torch.eye(8)
    mixing = torch.tensor([[0.7, 0, 0, 0, 0], [1, 4, 12, 0, 8], [1.0, 3, 3, 5, 9], [0.25, 0, 0, 0, 0]])
    mixed, mixed_targets = mix(images, targets, mixing)
    torch.testing.assert_close(mixed[0], 0.7 * images[0] + 0.3 * images[1])
    torch.testing.assert_close(mixed[7], 0.25 * images[7] + 0.75 * images[6])
    expected = images[2].clone()
    expected[:, 4:12, 0:8] = images[3][:, 4:12, 0:8]
    torch.testing.assert_close(mixed[2], expected)
    torch.testing.assert_close(mixed[4:6], images[4:6])  # an empty box
    torch.testing.assert_close(mixed_targets[2], torch.tensor([0, 0, 0.75, 0.25, 0, 0, 0, 0]))
    torch.testing.assert_close(mixed_targets[1], torch.tensor([0.3, 0.7, 0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(8))


def test_mixing_is_mixup_or_cutmix_with_equal_probability_and_follows_their_distributions():
    mixing = draw_mixing(4000, 32, 0.8, 1.0, seed=0)
    share, top, bottom, left, right = mixing.unbind(1)
    boxes = (bottom - top) * (right - left)
    cutmix = share == 1
    assert cutmix.float().mean() == pytest.approx(0.5, abs=0.03)
    assert (boxes[~cutmix] == 0).all() and (boxes[cutmix] > 0).float().mean() > 0.9
    assert share[~cutmix].mean() == pytest.approx(0.5, abs=0.03)
    assert share[~cutmix].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)  # of Beta(0.8, 0.8)
    assert (draw_mixing(100, 32, 0.8, 0.0, seed=0)[:, 0] < 1).all()
    assert (draw_mixing(100, 32, 0.0, 1.0, seed=0)[:, 0] == 1).all()
    assert torch.equal(mixing, draw_mixing(4000, 32, 0.8, 1.0, seed=0))


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
