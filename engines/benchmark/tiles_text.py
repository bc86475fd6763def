"""Text of docs/measurements/tiles.md, which `engines.benchmark.tiles` prints around its tables."""

INTRODUCTION = """\
# Images in tiles

    python -m engines.benchmark.tiles --picture docs/images/tiles.png > docs/measurements/tiles.md

Images that are larger than the sizes of a runtime are decoded in tiles inside each step
([decision 19](../decisions/0019-tiles-inside-each-step.md)). This page compares them with images that are decoded as a
whole, from the same noise. All tiles have 512×512 pixels, the largest size that the bundled decoder was trained for.
The decoder is the bundled one in float32, on the [machine](README.md#machine) of the other measurements. Its latent
cells have 16 pixels, as its patches; those of the released decoders have 32. The latents are those of the bundled photo
and of three photos of scikit-image (astronaut, chelsea, coffee), scaled and cropped to a quarter of the size of the
image.

The columns of quality are, over all photos:

- **PSNR** of the image in tiles, relative to the image as a whole, in dB: mean and lowest.
- **largest block**: largest difference of the mean of 16×16 pixels, in levels of 255.
- **borders**: mean step between the two pixels at an edge of a tile, divided by the mean step at the same place of the
  image that was decoded as a whole; the largest of all edges. It would be far above 1 if a border were visible.
- **elsewhere**: the same for all borders of 16×16 patches that are no edges of tiles.
"""

IMAGES = """\
## Quality and time

By the runtime, with its own choice of tiles. The times are medians over the photos of a decode in four steps, with the
copy of the pixels, both measured in turn. The time as a whole grows faster than the area, because of the attention.
"""

PICTURE = """\
The middle of the bundled photo at 1024×1024: decoded as a whole, in nine tiles of 512×512, and 16 times the difference,
relative to grey. The part has edges of tiles at 192 pixels from the left and from the top, and its overlaps cover all
of it.

![Two images that look the same, and a faint difference that follows the contents](../images/tiles.png)
"""

MEMORY = """\
## Memory

Peak of the resident memory of a process that loads the decoder and decodes the bundled photo twice; median of three
processes. An image in tiles adds 30 bytes per pixel to the memory for a tile: 24 for x and the sum of the tiles in
float32, and 3 each for the 8-bit pixels on the device and on the host. These are 31.5 MB for 1024×1024.
"""

OVERLAPS = """\
## Overlap

Two tiles of 512×512 side by side. The third and fourth column of PSNR are for the pixels that both tiles cover. Near
its edge, a tile is least accurate, because the convolutions of the adapter see their padding there. From 96 to 128
pixels on, the overlap is as accurate as the rest of the image, so that a larger one gains nothing: the runtime uses at
least 128 pixels, or half of a tile if that is less.
"""

TABLES = """\
## Position tables

Position tables are inputs of the step graph. A tile can have those of an image of its size, which the runtime uses, or
parts of those of the whole image. The latter are closer to the image as a whole by 0.5 dB on average, at an overlap of
128 pixels, and the borders are the same.
"""

BLENDS = """\
## Blend

Other weights in the overlap; the runtime uses the linear ramp. In the last variant, the tiles have their parts of the
adapter tokens of the whole latent, which engines of fixed sizes cannot compute. Most of the difference to an image as a
whole is therefore due to the adapter: its group norms have the statistics of a tile, and its convolutions see padding.
"""
