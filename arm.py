"""ARM: autoregressive pretraining of Vision Mamba (Ren et al., ICLR 2025, arXiv 2406.07537), the whole model.

An image is cut into patches, and neighbouring patches are grouped into square clusters. A causal Mamba reads one
cluster after another, and a small decoder predicts the pixels of the next cluster (`ARM`). The same encoder, given
four scan directions and a head, is then finetuned: for recognition (`ARMClassifier`), object detection (`ARMDetector`)
or semantic segmentation (`ARMSegmenter`).

    model = ARM(**MODELS["arm_base"])                 # pretraining
    loss = model(images)                              # images: (B, 3, 192, 192), normalised
    model = ARMClassifier(**MODELS["arm_base"])       # finetuning
    load_weights(model, "pretrained.pth")             # ours or the authors' released checkpoints
    logits = model(images)                            # images: (B, 3, 224, 224)

Read from the top: what is predicted from what (ARM), how it is finetuned (ARMEncoder, ARMClassifier), what both are
made of (Block, Mamba, the selective scan), detection and segmentation, loading weights; last, the scan once more as
fast kernels for GPUs.

The letters:
    B   images in a batch           L   tokens of an image
    S   tokens that are read        T   tokens that are predicted
    D   channels of a token (dim)   E   channels of a decoder token (decoder_dim)
    P   pixels along a patch side   G   scan directions of a mixer: 1 in pretraining, 4 in finetuning, any number works
    N   states of a channel, 16     R   rank of the step size delta, ceil(D / 16)
    W   width of the convolution, 4; in the shape of images their width, H their height
    A, B, C, D, delta and h also name the selective scan's own quantities, as in the Mamba paper (Gu & Dao, 2023).

Sections, equations and algorithms are those of the ARM paper unless another is named.
"""

import argparse
import functools
import hashlib
import math
import os
import pickle
import re
from types import SimpleNamespace
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings it where it supports CUDA; elsewhere the kernels below are never called
    triton, tl = SimpleNamespace(jit=lambda function: function), SimpleNamespace(constexpr=lambda value: value)

MODELS = {  # name: arguments of ARM and of the finetuning models
    "arm_tiny": dict(dim=128, depth=6),  # for the demonstration, not in the paper
    "arm_small": dict(dim=384, depth=12),  # for small data sets, not in the paper
    "arm_base": dict(dim=768, depth=12),
    "arm_large": dict(dim=1024, depth=24),
    "arm_huge": dict(dim=1536, depth=24),
}


class BadInput(ValueError):
    """What the user can mend, in one sentence; the scripts print it and exit with 2."""


def check(fits, sentence):
    if not fits:
        raise BadInput(sentence)


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining: predict the next cluster (section 3.2)


def cluster_order(grid, cluster_size, order="row", seed=0):
    """The order in which pretraining reads patches: cluster by cluster, row by row inside each.

    grid: patches along an image side; cluster_size: patches along a cluster side; order: one of ORDERS, of the clusters
    (the paper's, or those of its ablation); seed: of the random one. Returns (grid * grid,), a permutation of raster
    positions, as all orders here: sequence[i] = raster[order[i]]. Raises BadInput where clusters do not tile the grid.
    """
    check(cluster_size >= 1 and grid % cluster_size == 0,
          f"clusters of {cluster_size}x{cluster_size} patches do not tile {grid}x{grid} patches: choose a cluster size "
          f"that divides {grid}, or another patch size")
    n = grid // cluster_size
    raster = torch.arange(grid * grid).view(n, cluster_size, n, cluster_size)  # (cluster row, row, cluster col, col)
    clusters = raster.transpose(1, 2).flatten(2)  # (cluster row, cluster column, patches of a cluster)
    clusters = (clusters.transpose(0, 1) if order.startswith("column") else clusters).flatten(0, 1)
    if order == "random":
        return clusters[torch.randperm(n * n, generator=torch.Generator().manual_seed(seed), device="cpu")].flatten()
    return (clusters.flip(0) if order.endswith("reversed") else clusters).flatten()


ORDERS = ("row", "row_reversed", "column", "column_reversed", "random")


class ARM(nn.Module):
    """The pretraining model: a causal Mamba reads clusters 1..k, a decoder predicts the pixels of cluster k + 1.

    image_size, patch_size in pixels; cluster_size in patches along a side; dim, depth: the encoder's; decoder_dim,
    decoder_depth: the decoder's width (in 64s) and blocks; order, seed: as in cluster_order; target: "normalized" or
    "raw" pixels. Raises BadInput where these do not fit together.
    """

    def __init__(self, image_size=192, patch_size=16, cluster_size=4, dim=768, depth=12, decoder_dim=512,
                 decoder_depth=4, order="row", target="normalized", seed=0):
        super().__init__()
        check(order in ORDERS, f"order must be one of {', '.join(ORDERS)}, not {order}")
        check(target in ("normalized", "raw"), f"target must be normalized or raw, not {target}")
        self.target = target
        self.patch_embed = PatchEmbed(image_size, patch_size, dim)
        self.grid = grid = self.patch_embed.grid
        order = cluster_order(grid, cluster_size, order, seed)
        check(grid > cluster_size, f"one cluster of {cluster_size}x{cluster_size} patches fills the whole image of "
                                   f"{grid}x{grid}: choose a smaller cluster size, so that there is a next one")
        check(decoder_dim >= 64 and decoder_dim % 64 == 0, f"the decoder has heads of 64 channels: its width must be a "
                                                           f"multiple of 64, not {decoder_dim}")
        check(1 <= decoder_depth <= depth // 2 + 1, f"a decoder of {decoder_depth} blocks cannot tap an encoder of "
              f"{depth} from its middle to its end: choose 1 to {depth // 2 + 1}")
        self.tokens_per_cluster = cluster_size**2
        self.register_buffer("order", order)  # (L,); kept in checkpoints: pretraining can go on in this order alone
        # mask[i, j]: may query i, of cluster 2 + cluster_of[i], look at feature j, of cluster 1 + cluster_of[j]? Yes,
        # where that is an earlier one. (That nothing else reaches a prediction is tested in tests/test_model.py:
        # test_nothing_of_a_cluster_reaches_its_own_prediction_or_an_earlier_one.)
        cluster_of = torch.arange(len(order) - self.tokens_per_cluster) // self.tokens_per_cluster
        self.register_buffer("mask", cluster_of[None, :] <= cluster_of[:, None])  # (T, S)

        self.register_buffer("pos_embed", sincos_position(dim, grid)[None])  # (1, L, D)
        self.layers = nn.ModuleList(Block(dim, depth) for _ in range(depth))

        # The decoder taps blocks evenly spaced from the middle one to the last: 6, 8, 10, 12 of 12.
        spacing = depth / 2 / max(decoder_depth - 1, 1)
        self.taps = [depth - round(spacing * k) for k in reversed(range(decoder_depth))]
        self.tap_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.taps)
        self.tap_proj = linear(decoder_depth * dim, decoder_depth * decoder_dim)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, decoder_dim), std=0.02))
        self.register_buffer("decoder_pos_embed", sincos_position(decoder_dim, grid)[None])
        self.decoder = nn.ModuleList(DecoderBlock(decoder_dim) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.pixel_proj = linear(decoder_dim, 3 * patch_size**2)

    def forward(self, images):
        """images: (B, 3, H, W), normalised -> the loss, a scalar: mean squared error of all predicted patches."""
        return F.mse_loss(self.predict(images), self.targets(images)[0])

    def predict(self, images):
        """images: (B, 3, H, W) -> pixels (B, T, P * P * 3), in the form of the targets, of the T tokens after the first
        cluster, in cluster order. Those of cluster k + 1 are computed from clusters 1..k alone.
        """
        tapped = self.encode(images, self.order[: -self.tokens_per_cluster])  # from the last one nothing is predicted
        return self.decode(tapped, self.order[self.tokens_per_cluster :], self.mask)

    def encode(self, images, order):
        """images: (B, 3, H, W) -> what each tapped block makes of the S patches in `order`: a list of (B, S, D)."""
        x = self.patch_embed(images) + self.pos_embed  # (B, L, D)
        x = take(x, order)  # (B, S, D)
        tapped = []
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if i in self.taps:
                tapped.append(self.tap_norms[len(tapped)](x))
        return tapped

    def decode(self, tapped, order, mask):
        """tapped: as from encode -> pixels (B, T, P * P * 3) of the T patches in `order`; mask as in CrossAttention."""
        # Block k reads channels k, k + 4, k + 8, ... of the projected taps: so the released weights are laid out.
        features = self.tap_proj(torch.cat(tapped, dim=-1)).unflatten(-1, (-1, len(self.taps)))  # (B, S, E, 4)
        query = self.mask_token + self.decoder_pos_embed[0, order]  # (1 or B, T, E)
        query = query.expand(features.shape[0], -1, -1)
        for block, feature in zip(self.decoder, features.unbind(-1)):
            query = block(query, feature, mask)
        return self.pixel_proj(self.decoder_norm(query))  # (B, T, P * P * 3)

    def targets(self, images, order=None):
        """images: (B, 3, H, W) -> target patches (B, T, P * P * 3) in `order`, by default all after the first cluster,
        each minus its mean and over its spread; and those means and spreads, (B, T, 1) each. Raw pixels are left as
        they are, of mean 0 and spread 1.
        """
        order = self.order[self.tokens_per_cluster :] if order is None else order
        patches = take(self.to_patches(images), order)  # (B, T, P * P * 3)
        if self.target == "raw":
            return patches, 0.0, 1.0
        mean = patches.mean(dim=-1, keepdim=True)
        spread = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / spread, mean, spread

    def to_patches(self, images):
        """images: (B, 3, H, W) -> pixels (B, L, P * P * 3) in raster order. Inside a patch the channel comes last, as
        in the released code and MAE; the patch embedding, a convolution, has it first.
        """
        patches = F.pixel_unshuffle(images, self.patch_embed.patch_size)  # (B, 3 * P * P, rows, columns)
        return patches.unflatten(1, (3, -1)).flatten(3).permute(0, 3, 2, 1).flatten(2)

    def to_images(self, patches):
        """The inverse of to_patches."""
        patches = patches.unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)  # (B, L, 3 * P * P)
        return F.pixel_shuffle(patches.mT.unflatten(2, (self.grid, self.grid)), self.patch_embed.patch_size)

    @torch.no_grad()
    def reconstruct(self, images, predicted):
        """images: (B, 3, H, W), predicted as from predict -> (B, 3, H, W): each predicted patch with its own mean and
        spread given back; the first cluster, which is read and never predicted, as it is.
        """
        _, mean, spread = self.targets(images)
        patches = self.to_patches(images)  # (B, L, P * P * 3)
        patches[:, self.order[self.tokens_per_cluster :]] = predicted.float() * spread + mean
        return self.to_images(patches)

    def features(self, images):
        """images: (B, 3, H, W) -> the last tap, as a map (B, rows, columns, dim). A patch has seen those before it."""
        return self.encode(images, self.order)[-1][:, self.order.argsort()].unflatten(1, (self.grid, self.grid))


def take(tokens, order):
    """tokens: (B, L, D); order: (T,), or (B, T) where each image has its own -> (B, T, D)."""
    return tokens[:, order] if order.ndim == 1 else tokens.take_along_dim(order[..., None], dim=1)


class MAE(ARM):
    """The objective that the paper compares with (He et al., 2022), on the same encoder and decoder: three quarters of
    the patches are hidden, Mamba reads the others in raster order, and the decoder predicts the hidden ones from them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.order = torch.arange(self.grid**2)  # raster, for `features` too; there are no clusters

    def forward(self, images):
        """images: (B, 3, H, W), normalised -> the loss, a scalar: mean squared error of all hidden patches."""
        shuffled = torch.rand(images.shape[0], self.grid**2, device=images.device).argsort(dim=1)  # (B, L)
        visible, hidden = shuffled.tensor_split([self.grid**2 // 4], dim=1)  # (B, S), (B, T)
        tapped = self.encode(images, visible.sort(dim=1).values)
        return F.mse_loss(self.decode(tapped, hidden, mask=None), self.targets(images, hidden)[0])


class DecoderBlock(nn.Module):
    """Cross-attention to one tap of the encoder, then an MLP. There is no self-attention."""

    def __init__(self, dim):
        super().__init__()
        self.norm_query, self.norm_features, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = CrossAttention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, query, features, mask):
        query = query + self.attention(self.norm_query(query), self.norm_features(features), mask)
        return query + self.mlp(self.norm_mlp(query))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to features, in heads of 64 channels."""

    def __init__(self, dim):
        super().__init__()
        self.num_heads = dim // 64
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, query, features, mask):
        """query: (B, T, E); features: (B, S, E); mask: (T, S), true where a query may look, or None.
        Returns (B, T, E).
        """
        q, k, v = (t.unflatten(-1, (self.num_heads, 64)).transpose(1, 2)  # (B, heads, T or S, 64)
                   for t in (self.q(query), *self.kv(features).chunk(2, dim=-1)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------------------------------------------------
# Finetuning: four directions, and a classifier (section 3.3)


def scan_orders(grid, directions=4):
    """The orders in which finetuning scans: rows forward, rows backward, columns forward, columns backward; or the
    first one or two of these.

    The sequence holds grid * grid patches and a CLS token, which has the middle place, grid * grid // 2, in the raster
    sequence and in each of the four. Returns a LongTensor (directions, grid * grid + 1).
    """
    rows = torch.arange(grid * grid)
    columns = rows.view(grid, grid).T.flatten()
    patches = torch.stack([rows, rows.flip(0), columns, columns.flip(0)])  # (4, L - 1)
    middle = grid * grid // 2
    patches = patches + (patches >= middle)  # places in the sequence with CLS
    orders = torch.cat([patches[:, :middle], torch.full((4, 1), middle), patches[:, middle:]], dim=1)  # (4, L)
    return orders[:directions]


class ARMEncoder(nn.Module):
    """The encoder of the finetuning models: in raster order with a CLS token in the middle, scanned four ways.

    Nothing is predicted here, so there are no clusters; rows and columns, both ways, let every patch see every other.
    image_size, patch_size in pixels; drop_path: the rate that stochastic depth rises towards from block to block, in
    training. Raises BadInput where these do not fit together.
    """

    def __init__(self, image_size, patch_size, dim, depth, drop_path, directions=4):
        super().__init__()
        check(directions in (1, 2, 4), f"directions must be 1, 2 or 4, not {directions}")
        check(0 <= drop_path < 1, f"drop_path is a rate from 0 to below 1, not {drop_path}")
        self.patch_embed = PatchEmbed(image_size, patch_size, dim)
        self.grid = grid = self.patch_embed.grid
        check(grid > 1, f"one patch of {patch_size}x{patch_size} pixels is the whole image: choose a smaller one")
        self.register_buffer("orders", scan_orders(grid, directions))  # (G, L)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(with_cls(sincos_position(dim, grid)[None], torch.zeros(1, 1, dim)))
        # Block i has the rate of block i - 1, as in the released code; so the last one stays a step below drop_path.
        rates = [drop_path * max(i - 1, 0) / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(Block(dim, depth, directions, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim)

    def features(self, images):
        """images: (B, 3, H, W) -> the patch tokens after the final norm, as a map: (B, rows, columns, dim)."""
        return without_cls(self.encode(images)).unflatten(1, (self.grid, self.grid))

    def encode(self, images):
        """images: (B, 3, H, W) -> all tokens after the final norm, in raster order, CLS in the middle: (B, L, D)."""
        return self.norm(self.tap(images, [len(self.layers)])[0])

    def tap(self, images, taps):
        """images: (B, 3, H, W) -> what the blocks `taps`, counted from 1, make of all tokens: a list of (B, L, D)."""
        x = self.patch_embed(images)
        x = with_cls(x, self.cls_token.expand(x.shape[0], -1, -1)) + self.pos_embed  # (B, L, D)
        tapped = []
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x, self.orders)
            if i in taps:
                tapped.append(x)
        return tapped


class ARMClassifier(ARMEncoder):
    """Classes of images. pool, what the head reads: "mean" (the mean of the tokens before CLS and the mean of those
    after it, averaged; CLS itself is not read) or "cls"; the other arguments are ARMEncoder's.
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, num_classes=1000, drop_path=0.0, pool="mean",
                 directions=4):
        super().__init__(image_size, patch_size, dim, depth, drop_path, directions)
        check(pool in ("mean", "cls"), f'pool must be "mean" or "cls", not "{pool}"')
        self.pool = pool
        self.head = linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images):
        """images: (B, 3, H, W), normalised -> logits (B, num_classes)."""
        x, middle = self.encode(images), self.grid**2 // 2  # (B, L, D)
        if self.pool == "cls":
            return self.head(x[:, middle])
        return self.head((x[:, :middle].mean(dim=1) + x[:, middle + 1 :].mean(dim=1)) / 2)


def with_cls(patches, cls):
    """patches: (B, L - 1, D), cls: (B, 1, D) -> (B, L, D), CLS in the middle."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], cls, patches[:, middle:]], dim=1)


def without_cls(tokens):
    """tokens: (B, L, D) -> the patches alone, (B, L - 1, D)."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# What both are made of (section 3.1): patches and positions, the block, the MLP, the mixer


class PatchEmbed(nn.Conv2d):
    """The P x P convolution, stride P, that makes a token of each patch; LeCun-normal weight, zero bias.

    Raises BadInput where patches do not tile an image, or an image has another size.
    """

    def __init__(self, image_size, patch_size, dim):
        check(1 <= patch_size <= image_size and image_size % patch_size == 0,
              f"patches of {patch_size}x{patch_size} pixels do not tile an image of {image_size}x{image_size}: choose "
              f"an image size that is a multiple of the patch size")
        super().__init__(3, dim, patch_size, stride=patch_size)
        self.image_size, self.patch_size, self.grid = image_size, patch_size, image_size // patch_size
        std = math.sqrt(1 / (3 * patch_size**2)) / 0.87962566103423978  # a normal cut at 2 std has 0.88 of its spread
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)

    def forward(self, images):
        """images: (B, 3, H, W) -> (B, L, D) in raster order."""
        check(images.is_floating_point() and images.shape[1:] == (3, self.image_size, self.image_size), "this model "
              f"reads normalised images of shape (batch, 3, {self.image_size}, {self.image_size}), not {images.dtype} "
              f"of shape {tuple(images.shape)}")
        patches = images.unflatten(3, (self.grid, -1)).unflatten(2, (self.grid, -1))  # (B, 3, rows, P, columns, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, L, 3 * P * P)
        return F.linear(patches, self.weight.flatten(1), self.bias)  # the convolution; faster on GPUs


def sincos_position(dim, grid):
    """Fixed 2-D sin-cos position code of grid x grid patches in raster order: (grid * grid, dim), dim in fours."""
    check(dim % 4 == 0, f"the 2-D position code needs a number of channels that 4 divides, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))  # (D / 4,)
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega  # (L, D / 4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (L, D)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); drop_path: how often an image skips a branch, in training."""

    def __init__(self, dim, depth, directions=1, drop_path=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer, self.mlp = Mamba(dim, depth, directions), SwiGLU(dim)
        self.drop_path = drop_path
        self.recompute = False  # whether the backward pass computes activations again: less memory, more work

    def forward(self, x, orders=None):
        """x: (B, L, D); orders as in Mamba."""
        return checkpoint(self.branches, x, orders, use_reentrant=False) if self.recompute else self.branches(x, orders)

    def branches(self, x, orders):
        x = x + self.drop(self.mixer(self.norm1(x), orders))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch):
        """Stochastic depth: 0 for some images, in training; the others make up for it."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * (torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep) / keep


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), with biases and a hidden width of dim * 4 * 2 // 3."""

    def __init__(self, dim):
        super().__init__()
        hidden = dim * 4 * 2 // 3
        self.w1, self.w2, self.w3 = linear(dim, hidden), linear(dim, hidden), linear(hidden, dim)

    def forward(self, x):
        """x: (B, L, D) -> (B, L, D)."""
        pad = -self.w1.out_features % 64
        if x.is_cuda and pad:
            return self.padded(x, pad)
        return self.w3(F.silu(self.w1(x)) * self.w2(x))

    def padded(self, x, pad):
        """The same with `pad` more hidden units of zero weight: on GPUs, rows of whole 128 bytes are faster."""
        w1, w2 = (F.linear(x, F.pad(w.weight, (0, 0, 0, pad)), F.pad(w.bias, (0, pad))) for w in (self.w1, self.w2))
        return F.linear(F.silu(w1) * w2, F.pad(self.w3.weight, (0, pad)), self.w3.bias)


def linear(in_features, out_features, bias=True):
    """nn.Linear with PyTorch's initial weight and a zero bias."""
    layer = nn.Linear(in_features, out_features, bias)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Mamba(nn.Module):
    """The Mamba mixer (Mamba, algorithm 2; expansion 1), which scans in one direction or in several (section 3.3).

    One direction: causal, in the order in which the tokens come. Several: each direction reads its own permutation with
    parameters of its own; the outputs are put back and averaged. Input, output and gate projections are shared.
    """

    def __init__(self, dim, depth, directions=1, state_size=16, conv_width=4):
        super().__init__()
        G, D, N, W, self.rank = directions, dim, state_size, conv_width, math.ceil(dim / 16)
        self.in_proj, self.out_proj = linear(D, 2 * D, bias=False), linear(D, D, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)  # as in Mamba: what all blocks add up to starts with one's spread
        # What each direction owns: the convolution, the projections that make delta, B and C, A and the skip D.
        self.conv_weight, self.conv_bias = uniform(G, D, W, bound=W**-0.5), uniform(G, D, bound=W**-0.5)
        self.x_proj = uniform(G, self.rank + 2 * N, D, bound=D**-0.5)
        self.dt_proj = uniform(G, D, self.rank, bound=self.rank**-0.5)
        delta = torch.empty(G, D).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))  # softplus of it is delta
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(G, D, 1))
        self.D = nn.Parameter(torch.ones(G, D))

    def forward(self, u, orders=None):
        """u: (B, L, D); orders: (G, L), one permutation for each direction, or None for one direction as it comes."""
        conv1d, scan = kernels(u.device)
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (B, L, D) each
        x = conv1d(x, self.conv_weight, self.conv_bias, orders)  # (G, B, L, D)
        N = self.A_log.shape[-1]
        dt, B, C = torch.einsum("gbld,gnd->gbln", x, self.x_proj).split([self.rank, N, N], dim=-1)  # (G, B, L, R or N)
        dt = torch.einsum("gblr,gdr->gbld", dt, self.dt_proj)  # (G, B, L, D)
        return self.out_proj(scan(x, dt, self.dt_bias, -self.A_log.exp(), B, C, self.D, z, orders))  # (B, L, D)


def uniform(*shape, bound):
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


# ----------------------------------------------------------------------------------------------------------------------
# The selective scan: a linear recurrence whose coefficients depend on the input.


def selective_scan(x, dt, dt_bias, A, B, C, D, z, orders=None):
    """The selective scan with its step size, skip and gate (Mamba, algorithm 2), in G directions with parameters of
    their own, whose results are put back in one order and averaged:

        h_t = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t,   y_t = C_t h_t + D x_t,   delta_t = softplus(dt_t + dt_bias)

    x, dt: (G, B, L, D) in the orders of the scans; dt_bias, D: (G, D); A: (G, D, N), negative; B, C: (G, B, L, N); z:
    (B, L, D), the gate; orders: (G, L), the permutations of z's order in which the directions come, or None for one
    direction as it is. Returns (B, L, D) in the dtype of x; inside, everything is float32 (or float64, if x is).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x32, dt, dt_bias, A, B, C, D = (t.to(dtype) for t in (x, dt, dt_bias, A, B, C, D))
        delta = F.softplus(dt + dt_bias[:, None, None])  # (G, B, L, D)
        A = A.mT[:, None]  # (G, 1, N, D), channels last: what is summed over states is then fast
        h, ys = 0, []  # the state, (G, B, N, D)
        for delta_t, x_t, B_t, C_t in zip(*(t.unbind(2) for t in (delta, x32, B, C))):
            h = torch.exp(delta_t[:, :, None] * A) * h + (delta_t * x_t)[:, :, None] * B_t[..., None]
            ys.append((C_t[:, :, None] @ h).squeeze(-2))  # (G, B, D)
        return merge(torch.stack(ys, dim=2) + D[:, None, None] * x32, z, orders).to(x.dtype)


def merge(y, z, orders):
    """The end of the scans: y, (G, B, L, D), put back in the order of z, averaged and gated: (B, L, D)."""
    if orders is not None:
        y = torch.stack([y_g[:, order] for y_g, order in zip(y, orders.argsort(dim=-1))])
    return y.mean(dim=0) * F.silu(z)


def causal_conv1d(x, weight, bias, orders=None):
    """SiLU of depthwise convolutions in which a token sees itself and the width - 1 tokens before it, in G directions.

    x: (B, L, D); weight: (G, D, width); bias: (G, D); orders: (G, L), the order in which each direction reads x, or
    None for one direction as it comes. Returns (G, B, L, D) in those orders.
    """
    x = x[None] if orders is None else torch.stack([x[:, order] for order in orders])  # (G, B, L, D)
    length, width = x.shape[2], weight.shape[-1]
    past = F.pad(x, (0, 0, width - 1, 0))  # (G, B, width - 1 + L, D)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = sum(past[:, :, k : k + length] * weight[:, None, None, :, k] for k in range(width))
    return F.silu(y + bias[:, None, None])


def kernels(device):
    """The convolution and the scan that run on `device`: on CUDA those in Triton, at the end of this file, else the two
    above. The environment variable ARM_SCAN=torch, triton or mamba_ssm forces a choice. Raises BadInput for another
    value, or where the choice cannot run.
    """
    triton_installed = not isinstance(triton, SimpleNamespace)
    default = "triton" if triton_installed and device.type != "cpu" else "torch"
    choice = default if device.type == "meta" else os.environ.get("ARM_SCAN") or default
    if choice == "triton":
        check(triton_installed and (device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"),
              "ARM_SCAN=triton needs a CUDA device and Triton, which comes with PyTorch for CUDA")
        return triton_conv1d, triton_scan
    if choice == "mamba_ssm":
        check(device.type == "cuda" and mamba_ssm_installed(),
              "ARM_SCAN=mamba_ssm needs a CUDA device and the packages mamba-ssm and causal-conv1d")
        return mamba_ssm_conv1d, mamba_ssm_scan
    check(choice == "torch", f"ARM_SCAN={choice} is not a scan: use torch, triton or mamba_ssm")
    return causal_conv1d, selective_scan


# ----------------------------------------------------------------------------------------------------------------------
# Detection and segmentation: a pyramid made of the encoder's maps, and the heads of other papers


def pyramid(dim, half, quarter, norm):
    """Modules that make of a map of stride 16, (B, dim, ...), those of 4 (`quarter` channels), 8 (`half`), 16, 32."""
    stride_4 = nn.Sequential(nn.ConvTranspose2d(dim, half, 2, 2), norm(half), nn.GELU(),
                             nn.ConvTranspose2d(half, quarter, 2, 2))
    return nn.ModuleList([stride_4, nn.ConvTranspose2d(dim, half, 2, 2), nn.Identity(), nn.MaxPool2d(2)])


class ARMDetector(ARMEncoder):
    """Mask R-CNN (He et al., 2017), torchvision's, on the simple feature pyramid and with the heads of ViTDet (Li et
    al., 2022). Class 0 is the background, 1 to num_classes are the data's; channels: of the pyramid and the heads.
    """

    def __init__(self, image_size=1024, patch_size=16, dim=768, depth=12, num_classes=80, drop_path=0.0, channels=256):
        from torchvision.models import convnext  # here, since it takes as long as to import torch
        from torchvision.models.detection import MaskRCNN, faster_rcnn, mask_rcnn

        super().__init__(image_size, patch_size, dim, depth, drop_path)
        norm = functools.partial(convnext.LayerNorm2d, eps=1e-6)
        self.pyramid = nn.ModuleList(
            nn.Sequential(level, nn.Conv2d(width, channels, 1, bias=False), norm(channels),
                          nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels))
            for level, width in zip(pyramid(dim, dim // 2, dim // 4, norm), (dim // 4, dim // 2, dim, dim)))
        parts = MaskRCNN(
            SimpleNamespace(out_channels=channels), rpn_post_nms_top_n_train=1000,
            rpn_head=faster_rcnn.RPNHead(channels, num_anchors=3, conv_depth=2),
            box_head=faster_rcnn.FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024], norm),
            box_predictor=faster_rcnn.FastRCNNPredictor(1024, num_classes + 1),
            mask_head=mask_rcnn.MaskRCNNHeads(channels, [channels] * 4, 1, norm),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(channels, channels, num_classes + 1))
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads  # not its transform, which normalises and resizes again

    def forward(self, images, targets=None):
        """images: (B, 3, H, W), normalised. In training, with a dictionary for each image of "boxes" (n, 4), as left,
        top, right, bottom in pixels, "labels" (n,) and "masks" (n, H, W), uint8, as targets, returns the loss, a
        scalar; else such dictionaries, with "scores" (n,) and "masks" (n, 1, 28, 28), probabilities inside the boxes.
        """
        x = self.features(images).permute(0, 3, 1, 2)  # (B, D, rows, columns)
        maps = {str(i): level(x).float() for i, level in enumerate(self.pyramid)}
        maps["pool"] = F.max_pool2d(maps["3"], 1, 2)  # stride 64, for the region proposals alone
        sizes = [images.shape[2:]] * len(images)  # with their padding: RoIAlign keeps the scales of the first batch
        with torch.autocast(images.device.type, enabled=False):  # boxes have the precision of the maps
            proposals, losses = self.rpn(SimpleNamespace(tensors=images, image_sizes=sizes), maps, targets)
            detections, more_losses = self.roi_heads(maps, proposals, sizes, targets)
        return sum([*losses.values(), *more_losses.values()]) if self.training else detections


class ARMSegmenter(ARMEncoder):
    """UPerNet (Xiao et al., 2018) on maps of four depths, made a pyramid as in BEiT (Bao et al., 2022), with
    mmsegmentation's auxiliary head in training. channels: of UPerHead.
    """

    def __init__(self, image_size=512, patch_size=16, dim=768, depth=12, num_classes=150, drop_path=0.0, channels=512):
        super().__init__(image_size, patch_size, dim, depth, drop_path)
        self.norm = nn.Identity()  # the maps are taken without it
        self.taps = [depth * k // 4 for k in (1, 2, 3, 4)]  # counted from 1
        self.pyramid = pyramid(dim, dim, dim, nn.BatchNorm2d)
        self.head = UPerHead(dim, channels, num_classes)
        auxiliary_head = conv_norm_relu(dim, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1)
        self.auxiliary_head = nn.Sequential(*auxiliary_head)

    def forward(self, images, labels=None):
        """images: (B, 3, H, W), normalised. In training, with labels (B, H, W), of which 255 is none, returns the loss,
        a scalar; else logits (B, num_classes, H, W).
        """
        maps = [without_cls(x).mT.unflatten(2, (self.grid, self.grid)) for x in self.tap(images, self.taps)]
        maps = [level(x) for level, x in zip(self.pyramid, maps)]  # (B, D, rows, columns) of strides 4, 8, 16, 32
        logits = resize_map(self.head(maps).float(), images.shape[2:])
        if not self.training:
            return logits
        auxiliary = resize_map(self.auxiliary_head(maps[2]).float(), images.shape[2:])
        # The mean is over all pixels, those without a label among them, as mmsegmentation has it.
        loss, more = (F.cross_entropy(x, labels.long(), ignore_index=255, reduction="none").mean()
                      for x in (logits, auxiliary))
        return loss + 0.4 * more


class UPerHead(nn.Module):
    """Four maps of falling size, (B, dim, rows, columns) each -> logits (B, num_classes, ...) in the first one's."""

    def __init__(self, dim, channels, num_classes):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(side), conv_norm_relu(dim, channels, 1))
                                   for side in (1, 2, 3, 6))
        self.top = conv_norm_relu(dim + 4 * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_norm_relu(dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in range(3))
        self.fuse = conv_norm_relu(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps):
        *maps, last = maps
        pooled = [resize_map(pool(last), last.shape[2:]) for pool in self.pools]
        x = self.top(torch.cat([last, *pooled], dim=1))  # (B, channels, rows, columns)
        levels = [x]
        for k in (2, 1, 0):
            x = self.laterals[k](maps[k]) + resize_map(x, maps[k].shape[2:])
            levels.insert(0, self.smooth[k](x))
        levels = [resize_map(level, maps[0].shape[2:]) for level in levels]
        return self.classify(self.fuse(torch.cat(levels, dim=1)))


def conv_norm_relu(inputs, outputs, size):
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def resize_map(x, size):
    return F.interpolate(x, size=size, mode="bilinear")


# ----------------------------------------------------------------------------------------------------------------------
# Weights: our own checkpoints and the authors' released ones

RELEASED_NAMES = [  # (in the released checkpoints, here), regular expressions
    (r"^patch_embed\.proj\.", "patch_embed."), (r"^dec_pos_embed$", "decoder_pos_embed"),
    (r"^mask$", "released_mask"), (r"^norm_f\.", "norm."),
    (r"^norm_(\d+)\.", lambda m: f"tap_norms.{int(m[1]) - 1}."), (r"^enc2dec\.", "tap_proj."),
    (r"^ar_token$", "mask_token"), (r"^ar_norm\.", "decoder_norm."), (r"^ar_pred\.", "pixel_proj."),
    (r"^dec_block\.", "decoder."), (r"\.norm2_1\.", ".norm_query."), (r"\.norm2_2\.", ".norm_features."),
    (r"^(decoder\.\d+)\.norm2\.", r"\1.norm_mlp."), (r"\.attn2\.", ".attention."), (r"\.fc1\.", ".0."),
    (r"\.fc2\.", ".2."),
    (r"\.(conv1d|x_proj|dt_proj|A|D)(?:_b|_c|_c_b)(_log|\.weight|\.bias)?$", r".\1\2"),  # stacked by from_released
    (r"\.conv1d\.(weight|bias)$", r".conv_\1"), (r"\.dt_proj\.bias$", ".dt_bias"),
    (r"\.(x|dt)_proj\.weight$", r".\1_proj"),
]
RELEASED_DIRECTIONS = ["", "_b", "_c", "_c_b"]  # what the names of the four directions' parameters end with
OF_DIRECTIONS = (".conv_weight", ".conv_bias", ".x_proj", ".dt_proj", ".dt_bias", ".A_log", ".D")  # of Mamba, (G, ...)
WRAPPERS = r"(?<![^.])(module|model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # of other tools
ENCODER = ("patch_embed.", "layers.", "pos_embed")  # what every checkpoint must bring; all else may start fresh
HEADS = ("head.", "pyramid.", "rpn.", "roi_heads.", "auxiliary_head.")  # each is loaded as a whole or starts fresh
FIXED = ("order", "orders", "mask", "decoder_pos_embed")  # buffers that are computed, not learned


def rename_released(name):
    """The name here of a parameter of the released checkpoints, that of its direction left out."""
    for there, here in RELEASED_NAMES:
        name = re.sub(there, here, name)
    return name


def from_released(weights):
    """The released checkpoints' weights under the names here, those of a mixer's directions as one tensor (G, ...)."""
    def direction(name):
        of = re.search(r"\.mixer\.(?:conv1d|x_proj|dt_proj|A|D)(_b|_c|_c_b)?(?:_log|\.|$)", name)
        return RELEASED_DIRECTIONS.index(of and of[1] or "")

    found = {}
    for name in sorted(weights, key=direction):
        if direction(name) == 0 or rename_released(name) in found:  # no other stands in for a missing first direction
            found.setdefault(rename_released(name), []).append(weights[name])
    return {name: torch.stack([t.flatten(1) if t.ndim > 1 else t for t in tensors])  # a conv1d weight is (D, 1, width)
            if name.endswith(OF_DIRECTIONS) else tensors[0] for name, tensors in found.items()}


def read_checkpoint(path_or_url):
    """A checkpoint file or URL as a dictionary on the CPU, read without running any code that it may hold.

    Raises BadInput, in one sentence, for a file that is missing, damaged, or would need code to run.
    """
    name = str(path_or_url)
    try:
        if name.endswith(".safetensors") and os.path.exists(name):
            from safetensors.torch import load_file
            return load_file(name)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released files hold one
            if re.match(r"https?://", name):
                digest = hashlib.sha256(name.encode()).hexdigest()[:16]  # files of one name at two addresses differ
                found = torch.hub.load_state_dict_from_url(name, map_location="cpu", weights_only=True,
                                                           file_name=f"arm-{digest}.pth")
            else:
                found = torch.load(name, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"cannot read the checkpoint {name}: {error.strerror or error}") from None
    except ImportError:
        raise BadInput(f"to read {name}, install safetensors: pip install safetensors") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise BadInput(f"refused {name}: to read it, Python would have to call {code[1]}, and no file may have "
                           f"code run; save tensors and plain values alone, such as the model's state_dict()") from None
        raise BadInput(f"{name} is not a checkpoint, or is damaged: it cannot be read") from None
    check(isinstance(found, dict), f"{name} is not a checkpoint: it holds a {type(found).__name__}, not a dictionary")
    return found


def resize_position(pos_embed, grid, cls):
    """A position code (1, L, D), with or without CLS, bicubic-resized to grid x grid patches.

    Returns (1, grid * grid, D), or with `cls` (1, grid * grid + 1, D), a CLS code of zero where there was none. Raises
    BadInput where it is of no square image.
    """
    middle, side = pos_embed.new_zeros(1, 1, pos_embed.shape[-1]), math.isqrt(pos_embed.shape[1])
    if side**2 != pos_embed.shape[1]:
        check(side**2 == pos_embed.shape[1] - 1, f"a position code of {pos_embed.shape[1]} is of no square image")
        i = side**2 // 2
        pos_embed, middle = without_cls(pos_embed), pos_embed[:, i : i + 1]
    if side != grid:
        square = pos_embed.mT.unflatten(2, (side, side))  # (1, D, rows, columns)
        pos_embed = F.interpolate(square, size=(grid, grid), mode="bicubic").flatten(2).mT
    return with_cls(pos_embed, middle) if cls else pos_embed


def check_order(model, weights, path):
    """Raises BadInput where weights were trained on another order of as many tokens as the model's, or where the model
    has none, having been made on the meta device, and they bring none.
    """
    name = "orders" if hasattr(model, "orders") else "order"
    own, there = getattr(model, name), weights.get(name)
    check(not own.is_meta, 'this model is on the meta device: call model.to_empty(device="cpu") first')
    own = own.cpu()
    made = torch.equal(own.sort(dim=-1).values, torch.arange(own.shape[-1]).expand_as(own))
    known = there is not None and there.shape == own.shape
    check(made or known, f"this model was made on the meta device, and {path} does not hold its order of the tokens")
    check(not (made and known) or torch.equal(own, there.cpu()), f"{path} was trained with another order of the tokens "
          f"than this model's, and so is of no use to it")


def load_weights(model, path_or_url, ema=False):
    """Load a checkpoint, ours or a released one, pretrained or finetuned, into an ARM or a finetuning model.

    Renames the released names, copies a pretrained direction to all of the model's (section 3.3), resizes the position
    code, and leaves a head fresh where the file has none or another. `ema` takes the averaged weights of a finetuning
    checkpoint. Prints one line: what was loaded, what stayed fresh and what was ignored; returns the set of names that
    stayed fresh. Raises BadInput, in one sentence, where the file cannot be read safely, or its encoder or its order
    of the tokens is not this model's; the model is then unchanged.
    """
    file = read_checkpoint(path_or_url)
    part = "model_ema" if ema else "model" if isinstance(file.get("model"), dict) else "state_dict"
    check(not ema or part in file, f"{path_or_url} holds no averaged weights (model_ema): load it without ema")
    found = file.get(part, file)
    found = found.items() if isinstance(found, dict) else ()
    found = {re.sub(WRAPPERS, "", k): v for k, v in found if isinstance(k, str) and isinstance(v, torch.Tensor)}
    check(any(name.startswith(ENCODER) for name in found), f"{path_or_url} holds no weights of an ARM model")
    made, sizes = file.get("args"), ("model", "image_size", "patch_size")
    ours = isinstance(made, dict) and all(name in made for name in sizes)
    how = f", made with {' '.join(f'--{name} {made[name]}' for name in sizes)}," if ours else ""
    misfit = f"{path_or_url}{how} does not fit this model"

    if "patch_embed.proj.weight" in found:
        found = from_released(found)
    own, parts = model.state_dict(), {name.split(".")[0] for name in found}
    from_finetuned, finetuning = "cls_token" in found, "cls_token" in own
    found = {name: tensor for name, tensor in found.items()  # an order that was made a float may no longer be one
             if name not in own or tensor.is_floating_point() == own[name].is_floating_point()}
    check_order(model, found, path_or_url)
    if finetuning and "pos_embed" in found and found["pos_embed"].ndim == 3:
        found["pos_embed"] = resize_position(found["pos_embed"], model.grid, cls=True)
    loaded, fresh = {}, set()
    for name, tensor in own.items():
        there = found.get(name)
        if there is not None and name.endswith(OF_DIRECTIONS) and not (from_finetuned and finetuning):
            there = there[:1].expand(len(tensor), *there.shape[1:])
        if there is not None and there.shape == tensor.shape:
            loaded[name] = there
        elif name in FIXED or name == "pos_embed" and not finetuning:
            loaded[name] = tensor
        elif name.startswith(HEADS) or name.split(".")[0] not in parts and not name.startswith(ENCODER):
            fresh.add(name.split(".")[0])
        else:
            check(there is not None, f"{misfit}: it has no {name}, here {tuple(tensor.shape)}")
            raise BadInput(f"{misfit}: {name} has shape {tuple(there.shape)} there and {tuple(tensor.shape)} here")
    ignored = found.keys() - own.keys()
    deeper = min((name for name in ignored if name.startswith("layers.")), default=None)
    check(not deeper, f"{misfit}: it has {deeper}, and this model does not")
    loaded = {name: tensor for name, tensor in loaded.items() if name.split(".")[0] not in fresh}
    model.load_state_dict(loaded, strict=False)
    print(f"Loaded {len(loaded)} of {len(own)} tensors from {path_or_url} ({part}); "
          f"fresh: {', '.join(sorted(fresh)) or 'none'}; "
          f"ignored: {', '.join(sorted({name.split('.')[0] for name in ignored})) or 'none'}.")
    return fresh


# ----------------------------------------------------------------------------------------------------------------------
# The scan and the convolution on GPUs, in Triton: what selective_scan and causal_conv1d compute, forward and backward.
#
# A program is one warp of 32 threads. It walks the tokens of one sequence in one direction, for a block of channels,
# with the states of these channels in its registers, and keeps in memory only the state before every KEEP-th token.
# From these the backward walk computes the other states again, those of a chunk at a time, from the last chunk on.
#
# A block's states are a tile of three axes: (states in a thread, threads, channels in a thread). CHUNK threads share
# the states of a channel, and each would compute what the channel has one of: delta, the gate. So they divide the
# tokens: each computes these for one token of a chunk, and when the walk comes to that token passes them to the others
# (`of_token`). What threads add up, they add for CHUNK tokens at once, after which each has the sums of its own token
# (`fold`).
#
# Memory is slow to answer. So the walks go by groups of two chunks, and at the start of a group a thread loads what its
# two tokens have of their own (x, dt, the gate), and waits once. B and C, which channels share, it loads as it goes.

CHUNK = tl.constexpr(4)  # tokens, for as many of which registers have room; and threads to a channel
KEEP = tl.constexpr(8)  # tokens of a group, two chunks; `fold` and the walks rely on both numbers
LOG2E = tl.constexpr(math.log2(math.e))  # the GPU's exponential has base 2
FORWARD_BLOCK, BACKWARD_BLOCK, CONV_BLOCK = 32, 16, 128  # channels; the fastest of those tried on an H200


@triton.jit
def walk(batch, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A program's sequence, of which direction and image, and its block of channels. int64, since memory is large."""
    sequence, block = tl.program_id(0).to(tl.int64) // tl.cdiv(DIM, BLOCK), tl.program_id(0) % tl.cdiv(DIM, BLOCK)
    return sequence, sequence // batch, sequence % batch, block


@triton.jit
def state_tile(block, N: tl.constexpr, BLOCK: tl.constexpr):
    """Indices of a block's tile of states: states n and channels d, and the thread's number along either."""
    PER_THREAD: tl.constexpr = BLOCK * CHUNK // 32
    thread = tl.arange(0, 32)[None, :, None]
    n_thread, d_thread = thread // (32 // CHUNK), thread % (32 // CHUNK)
    n = tl.arange(0, N // CHUNK)[:, None, None] + n_thread * (N // CHUNK)
    d = tl.arange(0, PER_THREAD)[None, None, :] + d_thread * PER_THREAD + block * BLOCK
    return n, d, n_thread, d_thread


@triton.jit
def channel(tile, k):
    """The k-th channel in each thread, a tile with one channel in a thread. k is a constant, so nothing is computed."""
    tile_k = tl.where(tl.arange(0, tile.shape[2]) == k, tile.to(tl.int32, bitcast=True), 0)
    return tl.xor_sum(tile_k, 2, keep_dims=True).to(tile.dtype, bitcast=True)


@triton.jit
def load_states(states, n, d, DIM: tl.constexpr, N: tl.constexpr):
    """The tile from memory, (DIM, N). Channel by channel, so that each thread loads what it needs: the compiler might
    give one thread's channels to several, and would then have to pass them on.
    """
    tile = tl.zeros([n.shape[0], 32, d.shape[2]], tl.float32)
    for k in tl.static_range(d.shape[2]):
        d_k = channel(d, k)
        tile = tl.where(tl.arange(0, d.shape[2]) == k, tl.load(states + d_k * N + n, d_k < DIM, 0.0), tile)
    return tile


@triton.jit
def store_states(states, tile, n, d, DIM: tl.constexpr, N: tl.constexpr):
    """The same to memory."""
    for k in tl.static_range(d.shape[2]):
        d_k = channel(d, k)
        tl.store(states + d_k * N + n, channel(tile, k), d_k < DIM)


@triton.jit
def fold(a, b, BIT: tl.constexpr):
    """Add up two tiles between the pairs of threads whose numbers differ in one bit: the thread where it is 0 gets the
    sum of a, the other that of b. This takes half the messages of adding up both in both.
    """
    shape: tl.constexpr = [a.shape[0], 2, 2, 2, 2, 2, a.shape[2]]  # the threads' numbers in bits, the highest first
    upper = tl.reshape((tl.arange(0, 32) >> BIT) % 2 == 1, [1, 2, 2, 2, 2, 2, 1])
    a, b = tl.reshape(a, shape), tl.reshape(b, shape)
    given = tl.where(upper, a, b).to(tl.int32, bitcast=True)
    # Triton passes values between threads in reductions: the xor of what both give, xor one's own, is the other's.
    received = (given ^ tl.xor_sum(given, 5 - BIT, keep_dims=True)).to(tl.float32, bitcast=True)
    return tl.reshape(tl.where(upper, b, a) + received, [a.shape[0], 32, a.shape[6]])


@triton.jit
def exp(x):
    """The exponential of a finite x, by the GPU's of base 2; what rounding the product takes from it is made up for."""
    exponent = x * LOG2E
    e = tl.exp2(exponent)
    return e + e * tl.fma(x, LOG2E, -exponent) * (1 / LOG2E)


@triton.jit
def reciprocal(x):
    """1 / x by a reciprocal square root, which is one instruction, and a Newton step; a division is many."""
    r = tl.rsqrt(x)
    r *= r
    return r * (2 - x * r)


@triton.jit
def sigmoid(x):
    return reciprocal(1 + exp(tl.minimum(-x, 80)))  # which stays finite


@triton.jit
def silu_gradient(dy, x):
    """The gradient of x, where dy is that of silu(x) = x * sigmoid(x)."""
    s = sigmoid(x)
    return dy * s * (1 + x * (1 - s))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), by the series of 2 artanh(s) with s = e / (2 + e), at most 1 / 3."""
    e = exp(-tl.abs(x))
    s = e * reciprocal(2 + e)
    q = s * s
    return tl.maximum(x, 0) + 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11))))))


@triton.jit
def of_token(values, j):
    """What the thread of a chunk's token j has, in all threads of its channel."""
    thread = tl.arange(0, 32)[None, :, None] % (32 // CHUNK) + j * (32 // CHUNK)
    return tl.gather(values, tl.broadcast_to(thread, values.shape), 1)


@triton.jit
def load_two(values, i, i_next, real, real_next):
    """What a thread's two tokens of a group have in `values`; 0 past the end, where x = 0 and dy = 0 leave no trace."""
    return tl.load(values + i, real, 0), tl.load(values + i_next, real_next, 0)


@triton.jit
def decay_of(delta, j, A_2):
    """What is left of a state after a chunk's token j."""
    return tl.exp2(of_token(delta, j) * A_2)


@triton.jit
def next_state(h, decay, t, j, delta_x, B, n, N: tl.constexpr):
    """The state after token t, the j-th of its chunk, given the one before it."""
    return decay * h + of_token(delta_x, j) * tl.load(B + (t * N + n))


@triton.jit
def ungate(dy, z, ungated):
    """The gradients of y and z, where dy is that of ungated * silu(z)."""
    z = z.to(tl.float32)
    return dy * z * sigmoid(z), silu_gradient(dy * ungated, z)


@triton.jit
def scan_forward_kernel(x, dt, dt_bias, A, B, C, D, z, order, out, ungated, kept, batch, length, z_row: tl.constexpr,
                        SAVE: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr, DIM: tl.constexpr,
                        N: tl.constexpr, BLOCK: tl.constexpr):
    """From the first token to the last. What the backward walk needs is stored where SAVE says so: kept, and ungated
    where there is a gate to undo.
    """
    sequence, direction, image, block = walk(batch, DIM, BLOCK)
    n, d, n_thread, _ = state_tile(block, N, BLOCK)
    A_2 = load_states(A + direction * DIM * N, n, d, DIM, N) * LOG2E  # for an exponential of base 2
    D_ = tl.load(D + direction * DIM + d, d < DIM, 0.0)
    bias = tl.load(dt_bias + direction * DIM + d, d < DIM, 0.0)

    x += sequence * length * DIM
    dt += sequence * length * DIM
    B += sequence * length * N
    C += sequence * length * N
    z += image * length * z_row
    order += direction * length
    out += sequence * length * DIM
    ungated += sequence * length * DIM
    kept += sequence * tl.cdiv(length, KEEP) * DIM * N
    h = tl.zeros_like(A_2)
    for group in range(0, length, KEEP):
        t, t_next = group + n_thread, group + CHUNK + n_thread  # a thread's tokens, of the first chunk and of the next
        real, real_next = (t < length) & (d < DIM), (t_next < length) & (d < DIM)
        x_t, x_next = load_two(x, t * DIM + d, t_next * DIM + d, real, real_next)
        dt_t, dt_next = load_two(dt, t * DIM + d, t_next * DIM + d, real, real_next)
        place, place_next = t, t_next  # in the order of z
        if ORDERED:  # left as int64, since to convert them would be to wait for them
            place, place_next = load_two(order, t, t_next, t < length, t_next < length)
        if GATED:
            z_t, z_next = load_two(z, place * z_row + d, place_next * z_row + d, real, real_next)
        if SAVE:
            store_states(kept, h, n, d, DIM, N)
            kept += DIM * N
        for chunk in range(group, tl.minimum(group + KEEP, length), CHUNK):
            delta = softplus(dt_t.to(tl.float32) + bias)
            delta_x = delta * x_t.to(tl.float32)
            for j in tl.static_range(CHUNK):
                t_j = tl.minimum(chunk + j, length - 1)
                h = next_state(h, decay_of(delta, j, A_2), t_j, j, delta_x, B, n, N)
                y_j = tl.sum(h * tl.load(C + (t_j * N + n)), 0, keep_dims=True)
                if j % 2 == 0:
                    even = y_j
                elif j == 1:
                    pair = fold(even, y_j, 3)
                else:
                    y = fold(pair, fold(even, y_j, 3), 4) + D_ * x_t.to(tl.float32)
            if GATED:
                if SAVE:
                    tl.store(ungated + (place * DIM + d), y, real)
                y *= z_t.to(tl.float32) * sigmoid(z_t.to(tl.float32))
                z_t = z_next
            tl.store(out + (place * DIM + d), y, real)
            x_t, dt_t, place, real = x_next, dt_next, place_next, real_next


@triton.jit
def scan_backward_kernel(x, dt, dt_bias, A, B, C, D, z, order, ungated, kept, dout, dx, ddt, dz, dbias_dD, dA, dB_dC,
                         batch, length, z_row: tl.constexpr, GATED: tl.constexpr, ORDERED: tl.constexpr,
                         DIM: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """From the last token to the first: the gradient g of the state obeys the same recurrence backwards."""
    sequence, direction, image, block = walk(batch, DIM, BLOCK)
    n, d, n_thread, d_thread = state_tile(block, N, BLOCK)
    A_2 = load_states(A + direction * DIM * N, n, d, DIM, N) * LOG2E  # for an exponential of base 2
    D_ = tl.load(D + direction * DIM + d, d < DIM, 0.0)
    bias = tl.load(dt_bias + direction * DIM + d, d < DIM, 0.0)

    x += sequence * length * DIM
    dx += sequence * length * DIM
    dt += sequence * length * DIM
    ddt += sequence * length * DIM
    B += sequence * length * N
    C += sequence * length * N
    dB_dC += (tl.program_id(0) + (d_thread % 2 * tl.num_programs(0)).to(tl.int64)) * length * N + n
    z += image * length * z_row
    dz += image * length * DIM
    dout += image * length * DIM
    ungated += image * length * DIM
    order += direction * length
    kept += (sequence + 1) * tl.cdiv(length, KEEP) * DIM * N
    g, sum_dA = tl.zeros_like(A_2), tl.zeros_like(A_2)  # g is the gradient of the state, 0 past the end
    sum_dD, sum_dbias = tl.zeros_like(D_), tl.zeros_like(D_)
    for group in range((length - 1) // KEEP * KEEP, -1, -KEEP):
        kept -= DIM * N
        h = load_states(kept, n, d, DIM, N)
        t, t_next = group + CHUNK + n_thread, group + n_thread  # the second chunk is walked first
        real, real_next = (t < length) & (d < DIM), (t_next < length) & (d < DIM)
        x_t, x_next = load_two(x, t * DIM + d, t_next * DIM + d, real, real_next)
        dt_t, dt_next = load_two(dt, t * DIM + d, t_next * DIM + d, real, real_next)
        place, place_next = t, t_next  # in the order of z
        if ORDERED:
            place, place_next = load_two(order, t, t_next, t < length, t_next < length)
            place, place_next = place.to(tl.int32), place_next.to(tl.int32)
        dy, dy_next = load_two(dout, place * DIM + d, place_next * DIM + d, real, real_next)
        dy, dy_next = dy.to(tl.float32), dy_next.to(tl.float32)
        if GATED:
            z_t, z_next = load_two(z, place * z_row + d, place_next * z_row + d, real, real_next)
            ungated_t, ungated_next = load_two(ungated, place * DIM + d, place_next * DIM + d, real, real_next)
            dy, dz_t = ungate(dy, z_t, ungated_t)
            dy_next, dz_next = ungate(dy_next, z_next, ungated_next)
            tl.store(dz + (place * DIM + d), dz_t, real)
            tl.store(dz + (place_next * DIM + d), dz_next, real_next)

        # The state before the second chunk, from the one before the first.
        delta = softplus(dt_next.to(tl.float32) + bias)
        delta_x = delta * x_next.to(tl.float32)
        for j in tl.static_range(CHUNK):
            t_j = tl.minimum(group + j, length - 1)
            h = next_state(h, decay_of(delta, j, A_2), t_j, j, delta_x, B, n, N)

        for chunk_in_group in range(CHUNK, -1, -CHUNK):  # bounds that the compiler knows
            chunk = group + chunk_in_group
            if chunk_in_group == 0:
                h = load_states(kept, n, d, DIM, N)
            raw = dt_t.to(tl.float32) + bias
            delta = softplus(raw)
            delta_x = delta * x_t.to(tl.float32)
            states, decays = (), ()  # before each token, and from there to the next
            for j in tl.static_range(CHUNK):
                states, decays = states + (h,), decays + (decay_of(delta, j, A_2),)
                h = next_state(h, decays[j], tl.minimum(chunk + j, length - 1), j, delta_x, B, n, N)

            for j in tl.static_range(CHUNK - 1, -1, -1):
                t_j = tl.minimum(chunk + j, length - 1)
                delta_j, dy_j, B_j = of_token(delta, j), of_token(dy, j), tl.load(B + (t_j * N + n))
                g += dy_j * tl.load(C + (t_j * N + n))
                dB_j = tl.sum(of_token(delta_x, j) * g, 2, keep_dims=True)
                dB_dC_j = fold(dB_j, tl.sum(dy_j * h, 2, keep_dims=True), 0)
                ddx_j = tl.sum(g * B_j, 0, keep_dims=True)  # of delta x
                h = states[j]
                g *= decays[j]  # from here on the gradient of the state before token j
                ddelta_j = tl.sum(g * h * A_2, 0, keep_dims=True)
                sum_dA += g * h * delta_j
                if j % 2 == 1:
                    odd = (dB_dC_j, ddx_j, ddelta_j)
                else:
                    pair = (fold(dB_dC_j, odd[0], 1), fold(ddx_j, odd[1], 3), fold(ddelta_j, odd[2], 3))
                    if j == 2:
                        last = pair
            t, t_B = chunk + n_thread, chunk + d_thread // 2
            real = (t < length) & (d < DIM)  # again, rather than to hold it in registers
            tl.store(dB_dC + t_B * N, fold(pair[0], last[0], 2), t_B < length)
            ddx, ddelta = fold(pair[1], last[1], 4), fold(pair[2], last[2], 4) * (1 / LOG2E)
            ddt_t = (ddelta + x_t.to(tl.float32) * ddx) * sigmoid(raw)
            tl.store(ddt + (t * DIM + d), ddt_t, real)
            tl.store(dx + (t * DIM + d), delta * ddx + D_ * dy, real)
            sum_dD += dy * x_t.to(tl.float32)
            sum_dbias += ddt_t
            x_t, dt_t, dy = x_next, dt_next, dy_next
    store_states(dA + sequence * DIM * N, sum_dA, n, d, DIM, N)
    sums = fold(sum_dbias, sum_dD, 3)
    sequences = tl.num_programs(0) // tl.cdiv(DIM, BLOCK)
    tl.store(dbias_dD + (sequence + n_thread % 2 * sequences) * DIM + d, fold(sums, sums, 4), d < DIM)


@triton.jit
def conv_forward_kernel(x, weight, bias, order, out, batch, length, x_row: tl.constexpr, ORDERED: tl.constexpr,
                        DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One warp walks the tokens of one sequence in one direction, with the last WIDTH of them in a window. A group's
    tokens are loaded before its results are stored: the compiler moves no load past a store that might change it.
    """
    sequence, direction, image, block = walk(batch, DIM, BLOCK)
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < DIM
    end = tl.where(inside, length, 0)  # a channel that is not there has no tokens
    b = tl.load(bias + direction * DIM + d, inside, 0.0)
    taps, window = (), ()  # the oldest first
    for k in tl.static_range(WIDTH):
        taps += (tl.load(weight + (direction * DIM + d) * WIDTH + k, inside, 0.0),)
        window += (tl.zeros_like(b),)
    x += image * length * x_row + d
    out += sequence * length * DIM + d
    order += direction * length
    for group in range(0, length, KEEP):
        coming = ()
        for j in tl.static_range(KEEP):
            t = group + j
            place = tl.load(order + t, t < length, 0) if ORDERED else t
            coming += (tl.load(x + place * x_row, t < end, 0.0),)
        for j in tl.static_range(KEEP):
            window = window[1:] + (coming[j].to(tl.float32),)
            y = b
            for k in tl.static_range(WIDTH):
                y += taps[k] * window[k]
            tl.store(out + (group + j) * DIM, y * sigmoid(y), group + j < end)


@triton.jit
def conv_backward_kernel(x, weight, bias, order, dout, dx, dweight, dbias, batch, length, x_row: tl.constexpr,
                         ORDERED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The same backwards: the window holds token t and those before it, `later` the gradients of t and those after."""
    sequence, direction, image, block = walk(batch, DIM, BLOCK)
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < DIM
    begin = tl.where(inside, 0, length)  # a channel that is not there has no tokens
    b = tl.load(bias + direction * DIM + d, inside, 0.0)
    x += image * length * x_row + d
    dout += sequence * length * DIM + d
    dx += sequence * length * DIM + d
    order += direction * length
    taps, window, later, sums = (), (), (), ()
    for k in tl.static_range(WIDTH):
        taps += (tl.load(weight + (direction * DIM + d) * WIDTH + k, inside, 0.0),)
        later += (tl.zeros_like(b),)
        sums += (tl.zeros_like(b),)
        t = length - WIDTH + k
        place = tl.load(order + t, t >= 0, 0) if ORDERED else t
        window += (tl.load(x + place * x_row, t >= begin, 0.0).to(tl.float32),)
    sum_dbias = tl.zeros_like(b)
    for group in range(length - 1, -1, -KEEP):
        coming = ()
        for j in tl.static_range(KEEP):
            t = group - j
            place = tl.load(order + t - WIDTH, t >= WIDTH, 0) if ORDERED else t - WIDTH
            coming += ((tl.load(x + place * x_row, t - WIDTH >= begin, 0.0), tl.load(dout + t * DIM, t >= begin, 0.0)),)
        for j in tl.static_range(KEEP):
            t = group - j
            before, dy = coming[j]
            y = b
            for k in tl.static_range(WIDTH):
                y += taps[k] * window[k]
            dy = silu_gradient(dy.to(tl.float32), y)
            later = (dy,) + later[: WIDTH - 1]
            sum_dbias += dy
            dx_t = tl.zeros_like(dy)
            updated = ()
            for k in tl.static_range(WIDTH):
                updated += (sums[k] + dy * window[k],)
                dx_t += taps[k] * later[WIDTH - 1 - k]
            sums = updated
            place = tl.load(order + t, t >= 0, 0) if ORDERED else t
            tl.store(dx + place * DIM, dx_t, t >= begin)
            window = (before.to(tl.float32),) + window[: WIDTH - 1]
    for k in tl.static_range(WIDTH):
        tl.store(dweight + (sequence * DIM + d) * WIDTH + k, sums[k], inside)
    tl.store(dbias + sequence * DIM + d, sum_dbias, inside)


def evenly_spaced(t):
    """t, (B, L, D), and the elements from row to row: as it is where it is a slice of a wider tensor, else a copy."""
    if t.stride(2) != 1 or t.stride(0) != t.shape[1] * t.stride(1):
        return t.contiguous(), t.shape[2]
    return t, t.stride(1)


def launch(kernel, block, sequences, x, *arguments, orders, **options):
    """Run the kernel on the GPU that x is on, a program for each block of channels of each sequence. Of the options,
    maxnreg is the most registers of a thread: with 128, each of a multiprocessor's four schedulers has four warps to
    choose from, with 168 three; with a number between these some have more than others, which is slower.
    """
    order = x if orders is None else orders.contiguous()  # without orders not read
    dim = x.shape[-1]
    with torch.cuda.device_of(x):
        kernel[(sequences * triton.cdiv(dim, block),)](x, *arguments, order=order, ORDERED=orders is not None, DIM=dim,
                                                       BLOCK=block, num_warps=1, enable_fp_fusion=True, **options)


# A custom operator has memory made for its results by one function, on the GPU and, without running it, for the
# compiler. Parameters, B and C come as float32, contiguous. What is summed over images is left for it to sum.


def scan_results(x, N, save):
    """The results of scan_op: of each direction, gated only where there is one; and for the backward pass, if `save`,
    the result before the gate, if any, and the states before every KEEP-th token.
    """
    directions, batch, length, dim = x.shape
    ungated = x.shape if save and directions == 1 else 0
    kept = (directions, batch, triton.cdiv(length, KEEP.value), dim, N) if save else 0
    return x.new_empty(x.shape), x.new_empty(ungated), x.new_empty(kept, dtype=torch.float32)


@torch.library.custom_op("arm::scan", mutates_args=())
def scan_op(x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
            orders: Optional[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor]:
    (directions, batch, length, _), N = x.shape, A.shape[-1]
    x, dt, (z, z_row) = x.contiguous(), dt.contiguous(), evenly_spaced(z)
    out, ungated, kept = scan_results(x, N, save)
    launch(scan_forward_kernel, FORWARD_BLOCK, directions * batch, x, dt, dt_bias, A, B, C, D, z, out=out,
           ungated=ungated, kept=kept, batch=batch, length=length, z_row=z_row, SAVE=save, GATED=directions == 1, N=N,
           orders=orders, maxnreg=128)
    return out, ungated, kept


@scan_op.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, orders, save):
    return scan_results(x, A.shape[-1], save)


def scan_gradients(x, N):
    """The results of scan_backward_op: the gradients of x, dt and z; for each image, of dt_bias and D, and of A; and of
    B and C.
    """
    directions, batch, length, dim = x.shape
    shapes = (2, directions, batch, dim), (directions, batch, dim, N), (2, directions, batch, length, N)
    dz = x.new_empty(x.shape[1:] if directions == 1 else 0)
    return [x.new_empty(x.shape), x.new_empty(x.shape), dz, *(x.new_empty(s, dtype=torch.float32) for s in shapes)]


@torch.library.custom_op("arm::scan_backward", mutates_args=())
def scan_backward_op(dout: Tensor, x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                     z: Tensor, orders: Optional[Tensor], ungated: Tensor, kept: Tensor) -> list[Tensor]:
    (directions, batch, length, dim), N = x.shape, A.shape[-1]
    dout, x, dt, (z, z_row) = dout.contiguous(), x.contiguous(), dt.contiguous(), evenly_spaced(z)
    dx, ddt, dz, dbias_dD, dA, dB_dC = results = scan_gradients(x, N)
    blocks = triton.cdiv(dim, BACKWARD_BLOCK)
    of_blocks = x.new_empty(2, directions, batch, blocks, length, N, dtype=torch.float32)
    launch(scan_backward_kernel, BACKWARD_BLOCK, directions * batch, x, dt, dt_bias, A, B, C, D, z, ungated=ungated,
           kept=kept, dout=dout, dx=dx, ddt=ddt, dz=dz, dbias_dD=dbias_dD, dA=dA, dB_dC=of_blocks, batch=batch,
           length=length, z_row=z_row, GATED=directions == 1, N=N, orders=orders, maxnreg=168)
    torch.sum(of_blocks, dim=3, out=dB_dC)  # here, where the compiler's sum takes twice the time
    return results


@scan_backward_op.register_fake
def _(dout, x, dt, dt_bias, A, B, C, D, z, orders, ungated, kept):
    return scan_gradients(x, A.shape[-1])


def save_for_scan_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def scan_backward(ctx, dout, *_):
    """dout: (G, B, L, D), the same for every direction, since their results are averaged."""
    dx, ddt, dz, dbias_dD, dA, dB_dC = scan_backward_op(dout[0], *ctx.saved_tensors)
    (dbias, dD), (dB, dC) = dbias_dD.sum(2), dB_dC
    return dx, ddt, dbias, dA.sum(1), dB, dC, dD, dz if len(dx) == 1 else None, None, None


scan_op.register_autograd(scan_backward, setup_context=save_for_scan_backward)


def triton_scan(x, dt, dt_bias, A, B, C, D, z, orders=None):
    """`selective_scan` by the Triton kernels above, in float32."""
    dt_bias, A, B, C, D = (t.float().contiguous() for t in (dt_bias, A, B, C, D))
    y = scan_op(x, dt, dt_bias, A, B, C, D, z, orders, torch.is_grad_enabled())[0]
    return y.squeeze(0) if len(x) == 1 else merge(y, z, orders=None)  # y is in the order of z already


@torch.library.custom_op("arm::conv1d", mutates_args=())
def conv_op(x: Tensor, weight: Tensor, bias: Tensor, orders: Optional[Tensor]) -> Tensor:
    (directions, _, width), (batch, length, _) = weight.shape, x.shape
    x, x_row = evenly_spaced(x)
    out = x.new_empty(directions, *x.shape)
    launch(conv_forward_kernel, CONV_BLOCK, directions * batch, x, weight, bias, out=out, batch=batch, length=length,
           x_row=x_row, WIDTH=width, orders=orders)
    return out


@conv_op.register_fake
def _(x, weight, bias, orders):
    return x.new_empty(len(weight), *x.shape)


def conv_gradients(x, weight):
    """The results of conv_backward_op: the gradients of x for each direction, of weight and bias for each image."""
    shapes = [(len(weight), len(x), *t.shape[1:]) for t in (weight, weight[..., 0])]
    return [x.new_empty(len(weight), *x.shape), *(x.new_empty(s, dtype=torch.float32) for s in shapes)]


@torch.library.custom_op("arm::conv1d_backward", mutates_args=())
def conv_backward_op(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, orders: Optional[Tensor]) -> list[Tensor]:
    (directions, _, width), (batch, length, _) = weight.shape, x.shape
    dout, (x, x_row) = dout.contiguous(), evenly_spaced(x)
    dx, dweight, dbias = results = conv_gradients(x, weight)
    launch(conv_backward_kernel, CONV_BLOCK, directions * batch, x, weight, bias, dout=dout, dx=dx, dweight=dweight,
           dbias=dbias, batch=batch, length=length, x_row=x_row, WIDTH=width, orders=orders)
    return results


@conv_backward_op.register_fake
def _(dout, x, weight, bias, orders):
    return conv_gradients(x, weight)


def save_for_conv_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def conv_backward(ctx, dout):
    dx, dweight, dbias = conv_backward_op(dout, *ctx.saved_tensors)
    return dx.sum(0), dweight.sum(1), dbias.sum(1), None


conv_op.register_autograd(conv_backward, setup_context=save_for_conv_backward)


def triton_conv1d(x, weight, bias, orders=None):
    """`causal_conv1d` by the Triton kernels above."""
    return conv_op(x, weight.float().contiguous(), bias.float().contiguous(), orders)


# ----------------------------------------------------------------------------------------------------------------------
# The same by the packages mamba-ssm and causal-conv1d, for comparison


@functools.lru_cache
def mamba_ssm_installed():
    """Whether mamba-ssm and causal-conv1d can be imported."""
    try:
        import causal_conv1d as _, mamba_ssm as _  # noqa: E401, F401
    except ImportError:
        return False
    return True


def mamba_ssm_scan(x, dt, dt_bias, A, B, C, D, z, orders=None):
    """`selective_scan` by the mamba-ssm package's CUDA kernel, all directions in one call as its groups."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def channels_first(t):  # (G, B, L, D) -> (B, G * D, L), as the kernel reads it
        return t.permute(1, 0, 3, 2).flatten(1, 2)

    B, C = (t.to(x.dtype).permute(1, 0, 3, 2).contiguous() for t in (B, C))  # (B, G, N, L)
    y = selective_scan_fn(channels_first(x), channels_first(dt.to(x.dtype)), A.float().flatten(0, 1), B, C,
                          D.float().flatten(), delta_bias=dt_bias.float().flatten(), delta_softplus=True)
    return merge(y.unflatten(1, (len(x), -1)).permute(1, 0, 3, 2), z, orders)


def mamba_ssm_conv1d(x, weight, bias, orders=None):
    """`causal_conv1d` by the causal-conv1d package's CUDA kernel."""
    from causal_conv1d import causal_conv1d_fn

    x = x[:, None] if orders is None else x[:, orders]  # (B, G, L, D)
    weight, bias = weight.to(x.dtype).flatten(0, 1), bias.to(x.dtype).flatten()
    y = causal_conv1d_fn(x.transpose(2, 3).flatten(1, 2), weight, bias, activation="silu")
    return y.unflatten(1, x.shape[1::2]).permute(1, 0, 3, 2)
