"""A drawn dataset in COCO format."""

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 64, 48
NAMES = {3: "disc", 7: "square"}  # ids with gaps, as in COCO


def draw(folder, count, seed):
    """Draw bright discs and squares on noise; returns their annotations. The last image is empty."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture = Image.fromarray(random.integers(0, 80, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(picture)
        for place, (category, name) in enumerate(NAMES.items() if number < count else ()):
            side = int(random.integers(14, 24))
            left, top = int(random.integers(0, 32 - side)) + 32 * place, int(random.integers(0, HEIGHT - side))
            if name == "disc":
                pen.ellipse((left, top, left + side - 1, top + side - 1), (250, 60, 60))
                angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                outline = np.stack([np.cos(angles), np.sin(angles)], 1) * side / 2 + side / 2 + (left, top)
                polygon = outline.ravel().tolist()
            else:
                pen.rectangle((left, top, left + side - 1, top + side - 1), (60, 250, 60))
                polygon = [left, top, left + side, top, left + side, top + side, left, top + side]
            annotations.append(
                {
                    "id": len(annotations),  # starts at 0
                    "image_id": number * 10,
                    "category_id": category,
                    "bbox": [left, top, side, side],
                    "segmentation": [polygon],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        picture.save(folder / f"{number:03}.png")
        images.append({"id": number * 10, "file_name": f"{number:03}.png", "width": WIDTH, "height": HEIGHT})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in reversed(NAMES.items())],
    }
