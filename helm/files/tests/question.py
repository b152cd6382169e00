"""A question about an image is answered, and the answer says what made it."""

import io
import os

from PIL import Image

from hscr.client import Client

image = io.BytesIO()
Image.new("L", (64, 64), 128).save(image, "PNG")
with Client(os.environ["HSCR_URL"], os.environ["HSCR_API_KEY"]) as client:
    answer = client.ask(image.getvalue(), "Is there a nodule?")
print(answer.text, answer.provenance.model_dump_json())  # noqa: T201
if not (answer.text and answer.provenance.model_digest):
    raise SystemExit("The answer is empty or does not say what made it.")
