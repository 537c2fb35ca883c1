"""What the paper's ablations vary: each choice trains, and none lets a cluster reach its own prediction."""

import pytest
import torch
from conftest import script
from soak import TINY

from arm import ARM, MAE, ORDERS, ARMClassifier, cluster_order, load_weights, scan_orders


def small(kind=ARM, **changes):
    torch.manual_seed(0)
    return kind(**dict(dict(image_size=48, patch_size=4, dim=16, depth=4, decoder_dim=64, decoder_depth=2), **changes))


def test_orders_of_clusters_are_what_their_names_say():
    def clusters(order, seed=0):  # of 2 x 2 clusters of 1 patch: which comes first, second, ...
        return cluster_order(2, 1, order, seed).tolist()

    assert clusters("row") == [0, 1, 2, 3] and clusters("row_reversed") == [3, 2, 1, 0]
    assert clusters("column") == [0, 2, 1, 3] and clusters("column_reversed") == [3, 1, 2, 0]
    assert cluster_order(4, 2, "column").tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert cluster_order(4, 2, "row_reversed").tolist()[:4] == [10, 11, 14, 15]  # a cluster's patches stay in order
    random = [cluster_order(12, 4, "random", seed).tolist() for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2] and sorted(random[0]) == list(range(144))
    assert random[0][:4] == list(range(random[0][0], random[0][0] + 4))  # a row of a cluster


@pytest.mark.parametrize("cluster_size, units", [(1, 144), (2, 36), (3, 16), (4, 9), (6, 4)])
def test_cluster_sizes_give_the_papers_numbers_of_prediction_units(cluster_size, units):
    model = small(cluster_size=cluster_size)
    assert len(model.order) // model.tokens_per_cluster == units
    assert model.predict(torch.randn(1, 3, 48, 48)).shape == (1, 144 - cluster_size**2, 48)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cluster_size", [1, 3, 4, 6])
def test_nothing_of_a_cluster_reaches_its_own_prediction_in_any_order_of_any_clusters(order, cluster_size):
    model, images = small(order=order, cluster_size=cluster_size, seed=3).eval(), torch.randn(1, 3, 48, 48)
    places = model.order.view(-1, cluster_size**2)  # (clusters, patches of a cluster)
    with torch.no_grad():
        before = model.predict(images).unflatten(1, (len(places) - 1, -1))  # clusters 2, 3, ...
        for k in {0, 1, len(places) // 2, len(places) - 1}:  # cluster k + 1
            row, column = divmod(places[k, -1].item(), 12)
            changed = images.clone()
            changed[:, :, 4 * row + 3, 4 * column + 2] += 1
            after = model.predict(changed).unflatten(1, (len(places) - 1, -1))
            assert torch.equal(after[:, :k], before[:, :k])  # clusters 2..k + 1, bit for bit
            assert all((after[:, j] != before[:, j]).any() for j in range(k, len(places) - 1))


def test_raw_targets_are_the_pixels_themselves():
    model, images = small(target="raw", cluster_size=6), torch.randn(2, 3, 48, 48)
    targets, _, _ = model.targets(images)
    torch.testing.assert_close(targets[1, 0], images[1, :, :4, 24:28].permute(1, 2, 0).flatten())
    torch.testing.assert_close(model.reconstruct(images, targets), images)


def test_masked_prediction_hides_three_quarters_reads_the_rest_in_raster_order_and_sees_nothing_hidden(monkeypatch):
    model, images, seen = small(MAE), torch.randn(2, 3, 48, 48), {}
    encode, targets = model.encode, model.targets
    monkeypatch.setattr(model, "encode", lambda x, order: seen.update(read=order) or encode(x, order))
    monkeypatch.setattr(model, "targets", lambda x, order: seen.update(hidden=order) or targets(x, order))
    model(images).backward()
    assert all(p.grad is not None for p in model.parameters())
    read, hidden = seen["read"], seen["hidden"]
    assert read.shape == (2, 36) and hidden.shape == (2, 108) and (read.diff(dim=1) > 0).all()
    assert not torch.equal(read[0], read[1])
    assert sorted(read[1].tolist() + hidden[1].tolist()) == list(range(144))
    with torch.no_grad():
        predicted = model.decode(encode(images, read), hidden, None)
        for b in range(2):
            row, column = divmod(hidden[b, 7].item(), 12)
            images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        assert torch.equal(model.decode(encode(images, read), hidden, None), predicted)


def test_directions_are_the_first_of_the_four_and_start_from_the_pretrained_one(tmp_path):
    pretrained = small()
    torch.save(dict(model=pretrained.state_dict()), tmp_path / "pre.pth")
    for directions in (1, 2, 4):
        assert torch.equal(scan_orders(12, directions), scan_orders(12)[:directions])
        model = ARMClassifier(48, 4, dim=16, depth=4, num_classes=3, directions=directions)
        load_weights(model, tmp_path / "pre.pth")
        assert model.layers[1].mixer.x_proj.shape[0] == directions
        for x_proj in model.layers[1].mixer.x_proj:
            assert torch.equal(x_proj, pretrained.layers[1].mixer.x_proj[0])
    with pytest.raises(ValueError, match="directions must be 1, 2 or 4"):
        ARMClassifier(48, 4, dim=16, depth=4, directions=3)


@pytest.mark.parametrize("changes", [["--order", "random"], ["--target", "raw"], ["--objective", "mae"],
                                     ["--decoder_depth", 1, "--decoder_dim", 64], ["--cluster_size", 1]])
def test_every_ablation_of_pretraining_trains_and_what_it_makes_is_finetuned_in_fewer_directions(images, tmp_path,
                                                                                                 changes):
    arguments = [*TINY, "--workers", 0, "--epochs", 1, "--warmup_epochs", 0, "--data", images]
    code, output = script("pretrain", *arguments, "--cluster_size", 2, *changes, "--out", tmp_path / "pre")
    assert code == 0, output
    if changes[0] == "--order":
        code, output = script("finetune", *arguments, "--directions", 2, "--init", tmp_path / "pre" / "last.pth",
                              "--out", tmp_path / "fine")
        assert code == 0, output
        code, output = script("finetune", "--data", images, "--workers", 0, "--eval", tmp_path / "fine" / "best.pth")
        assert code == 0 and "Model: top-1" in output, output


@pytest.mark.parametrize("arguments, sentence", [
    (["--cluster_size", 6], "one cluster of 6x6 patches fills the whole image"),
    (["--order", "spiral"], "invalid choice"), (["--decoder_dim", 100], "multiple of 64"),
    (["--decoder_depth", 5], "choose 1 to 4")])
def test_ablations_that_cannot_be_are_refused_with_a_sentence(arguments, sentence):
    code, output = script("pretrain", "--drawings", 64, *arguments)
    assert code == 2 and sentence in output and "Traceback" not in output, output
