"""Draws .github/idea.png, the idea of ARM in one picture, from what the code computes: the order in which pretraining
reads patches, the decoder's mask, and the four orders in which finetuning scans. It needs matplotlib:

    python tests/figure_idea.py
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from arm import ARM, cluster_order, scan_orders  # noqa: E402
from pretrain import Drawings  # noqa: E402

INK, GREY = "#222222", "#606060"
COLOURS = plt.get_cmap("viridis")(np.linspace(0, 0.9, 9))  # of the clusters, in the order in which they are read
image = Drawings(40, 384, seed=0).images[34].permute(1, 2, 0).numpy() / 255
image = image.reshape(96, 4, 96, 4, 3).mean(axis=(1, 3))  # less noise, which would make a large file
image = 0.4 + 0.6 * image  # pale, for lines to show on it
figure = plt.figure(figsize=(8.3, 3.3))


def panel(left, title, text, low, high):
    """Square axes, `left` inches from the picture's left edge, with a title and a line of text; y points down."""
    figure.text(left / 8.3, 3 / 3.3, title, fontsize=11, weight="bold", color=INK)
    figure.text(left / 8.3, 2.8 / 3.3, text, fontsize=8, color=GREY)
    ax = figure.add_axes([left / 8.3, 0.1 / 3.3, 2.5 / 8.3, 2.5 / 3.3], xlim=(low, high), ylim=(high, low))
    ax.axis("off")
    return ax


def draw_square(ax, pixels, x, y, size, cells):
    """Pixels, cut into cells x cells by lines; x, y: the upper left corner."""
    ax.imshow(pixels, extent=(x, x + size, y + size, y), interpolation="bilinear")
    lines = np.arange(1, cells) * size / cells
    ax.hlines(y + lines, x, x + size, color="white", linewidth=0.7)
    ax.vlines(x + lines, y, y + size, color="white", linewidth=0.7)


def draw_label(ax, label, x, y, fontsize, shape, colour):
    ax.text(x, y, label, fontsize=fontsize, weight="bold", ha="center", va="center", zorder=5,
            color=INK if np.mean(colour[:3]) > 0.45 else "white",
            bbox=dict(boxstyle=shape + ",pad=0.2", facecolor=colour, edgecolor="none"))


def draw_cluster(ax, k, x, y, size, cells, fontsize):
    """Cluster k, counted from 0, and its number."""
    row, column = 8 * (order[16 * k] // 12), 8 * (order[16 * k] % 12)  # pixels above and left of its first patch
    draw_square(ax, image[row : row + 32, column : column + 32], x, y, size, cells)
    ax.add_patch(plt.Rectangle((x, y), size, size, fill=False, edgecolor=COLOURS[k], linewidth=fontsize / 6))
    draw_label(ax, k + 1, x + size / 2, y + size / 2, fontsize, "circle", COLOURS[k])


def draw_path(ax, x, y):
    ax.plot(x, y, color=INK, linewidth=0.9)
    head = dict(arrowstyle="-|>,head_width=0.2,head_length=0.4", color=INK, linewidth=0.9, shrinkA=0, shrinkB=0)
    ax.annotate("", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops=head)


ax = panel(0.1, "Cut and read", "patches in clusters, cluster after cluster", -0.1, 13.1)
order = cluster_order(grid=12, cluster_size=4).numpy()  # the paper's geometry
row, column = order // 12, order % 12
x, y = column + 0.5 + column // 4 / 2, row + 0.5 + row // 4 / 2  # patch centres; clusters are half a patch apart
for k in range(9):
    draw_cluster(ax, k, x[16 * k] - 0.5, y[16 * k] - 0.5, 4, cells=4, fontsize=11)
for i in range(0, 144, 4):
    draw_path(ax, x[i : i + 4], y[i : i + 4])  # along a row of a cluster
for i in range(16, 144, 16):
    draw_path(ax, x[i - 1 : i + 1], y[i - 1 : i + 1])  # to the next cluster

ax = panel(2.9, "Predict the next cluster", "from the clusters that have been read", -0.55, 9.05)
mask = ARM(image_size=192, patch_size=16, cluster_size=4, dim=64, depth=6, decoder_dim=64).mask.numpy()
seen = np.where(mask[..., None], COLOURS[np.arange(128) // 16], 0.93)  # features in the colour of their cluster
draw_square(ax, seen, 1, 1, 8, cells=8)
for k in range(8):
    draw_cluster(ax, k, 1.1 + k, 0.1, 0.8, cells=1, fontsize=6.5)
    draw_cluster(ax, k + 1, 0.1, 1.1 + k, 0.8, cells=1, fontsize=6.5)
ax.text(5, -0.1, "has read", fontsize=8, ha="center", color=GREY)
ax.text(-0.1, 5, "predicts", fontsize=8, ha="right", va="center", rotation=90, color=GREY)
ax.text(7, 3, "not read yet", fontsize=8, ha="center", va="center", color=GREY, backgroundcolor="#ededed")

ax = panel(5.7, "Finetune: four directions", "the class token, CLS, is read half-way", -0.1, 9.5)
names = ["rows forward", "rows backward", "columns forward", "columns backward"]
for k, places in enumerate(scan_orders(grid=4).numpy()):
    left, top = 5.4 * (k % 2), 0.5 + 4.9 * (k // 2)
    patches = places - (places > 8)  # place 8 of the sequence, the middle, is that of CLS
    x = np.where(places == 8, 2, patches % 4 + 0.5) + left
    y = np.where(places == 8, 2, patches // 4 + 0.5) + top
    draw_square(ax, image, left, top, 4, cells=4)
    draw_path(ax, x, y)
    ax.plot(x[0], y[0], "o", color=INK, markersize=4)
    draw_label(ax, "CLS", left + 2, top + 2, 6.5, "round", (0.84, 0.37, 0))
    ax.text(left + 2, top - 0.2, names[k], fontsize=8, ha="center", color=INK)

path = ROOT / ".github" / "idea.png"
figure.savefig(path, dpi=200)
Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)  # 0.4 times the bytes
