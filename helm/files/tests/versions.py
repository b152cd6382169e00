"""Each version that the pointer names is asked by name, and is the one that answers."""

import io
import os

from PIL import Image

from hscr.client import Client

image = io.BytesIO()
Image.new("L", (64, 64), 128).save(image, "PNG")
with Client(os.environ["HSCR_URL"], os.environ["HSCR_API_KEY"]) as client:
    pointer = client.pointer()
    for version in {pointer.active, pointer.previous, None}:
        answer = client.ask(image.getvalue(), "Is there a nodule?", adapter=version or "base")
        print(version or "base", "→", answer.provenance.adapter or "base")  # noqa: T201
        if answer.provenance.adapter != version:
            raise SystemExit(f"{version or 'The base model'} was asked, another version answered.")
