"""Plugin: a source of texts that count, and one of images that are bright on one side."""

import numpy as np

from lit_tokenformer.data.images.sources import ArraySamples, ImageSource, Splits
from lit_tokenformer.data.text.sources import TextList, TextSplits
from lit_tokenformer.registry import IMAGE_SOURCES, TEXT_SOURCES


@TEXT_SOURCES.register("counting")
def counting(settings):
    return TextSplits(TextList(" ".join(str(n + i) for i in range(40)) for n in range(100)))


def sides(settings):
    images = np.zeros((64, 8, 8), dtype=np.uint8)
    images[::2, :, :4] = images[1::2, :, 4:] = 255
    samples = ArraySamples(images, np.arange(64) % 2)
    return Splits(["left", "right"], samples, samples, samples, len(images))


IMAGE_SOURCES.register("sides")(ImageSource(sides, image_size=8, tiny=True))
