"""A chat request's messages to token ids and pixels, refused here if they cannot be used."""

import base64
import binascii
import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image
from torch import Tensor

from hscr.errors import ImageTooLarge, InvalidImage, InvalidQuestion
from hscr.models.vlm import VLM
from service.embedded.schemas import EmbedsPart, ImagePart, Message, TextPart
from service.embedded.visual import visual_tokens

_DATA_URL = re.compile(r"data:image/(?:png|jpeg);base64,")
_MAX_PIXELS = 64_000_000


@dataclass(eq=False)
class Picture:
    """One image: `pixels` [1, 3, H, W] until the model has made its projected visual `tokens` [N, d]."""

    pixels: Tensor | None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Prompt:
    """`length` is what the language model reads: token ids with the visual tokens in their place."""

    ids: list[int]
    picture: Picture | None
    length: int


class Pictures:
    """The most recently used images by digest, so that several questions about one are encoded once.

    Belongs to one thread. What it has dropped lives on in the prompts that still hold it.
    """

    def __init__(self, vlm: VLM, capacity: int = 256) -> None:
        self._vlm = vlm
        self._capacity = capacity
        self._known: OrderedDict[str, Picture] = OrderedDict()

    def get(self, data: bytes) -> Picture:
        """The image of these PNG or JPEG bytes. Raises InvalidImage, ImageTooLarge."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._known:
            self._known[digest] = Picture(self._vlm.pixel_values([_decode(data)]))
        self._known.move_to_end(digest)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return self._known[digest]


def prepare(vlm: VLM, pictures: Pictures, messages: Sequence[Message], *, continued: bool = False) -> Prompt:
    """Tokenise a conversation with at most one image; `continued`, to the end of the assistant's last text.

    Raises InvalidQuestion (empty, too long, control tokens, several images) and InvalidImage.
    """
    parts = [part for message in messages for part in message.parts]
    images = [part for part in parts if not isinstance(part, TextPart)]
    if len(images) > 1:
        raise InvalidQuestion(f"The request carries {len(images)} images.", remedy="Send at most one.")
    if not any(part.text.strip() for part in parts if isinstance(part, TextPart)):
        raise InvalidQuestion("The request carries no text.", remedy="Write what you want to know.")
    _require_end(messages[-1], continued=continued)
    ids = vlm.chat_ids([_template_message(message) for message in messages], continued=continued)
    picture = _picture(vlm, pictures, images[0]) if images else None
    return Prompt(ids, picture, len(ids) + (vlm.image_token_count - 1 if picture else 0))


def _require_end(last: Message, *, continued: bool) -> None:
    if not continued and last.role != "user":
        raise InvalidQuestion("The last message is not the user's.", remedy="End with a user message.")
    said = any(isinstance(part, TextPart) and part.text.strip() for part in last.parts)
    if continued and not (last.role == "assistant" and said):
        raise InvalidQuestion(
            "The last message is not the assistant's, or says nothing to continue.",
            remedy="End with an assistant message, or leave `continue_final_message` out.",
        )


def _picture(vlm: VLM, pictures: Pictures, part: ImagePart | EmbedsPart) -> Picture:
    if isinstance(part, EmbedsPart):
        return Picture(pixels=None, tokens=visual_tokens(part.image_embeds, vlm))
    return pictures.get(_image_bytes(part.image_url.url))


def _template_message(message: Message) -> dict[str, object]:
    parts = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}


def _image_bytes(url: str) -> bytes:
    header = _DATA_URL.match(url)
    if header is None:
        raise InvalidImage(
            "Only data URLs are accepted: nothing is fetched.",
            remedy="Send data:image/png;base64,… or data:image/jpeg;base64,….",
        )
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except binascii.Error as error:
        raise InvalidImage("The image is not valid base64.", remedy="Encode its bytes again.") from error


def _decode(data: bytes) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ImageTooLarge(
                    f"The image has {image.width} × {image.height} pixels.", remedy="Send a smaller one."
                )
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageTooLarge("The image has too many pixels.", remedy="Send a smaller one.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidImage("The bytes are no readable PNG or JPEG.", remedy="Send a whole image.") from error
